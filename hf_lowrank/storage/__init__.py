"""Files written whole, locks, checksums, parsing, tables of rows: knows no run and no model."""
