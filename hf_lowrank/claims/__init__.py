"""The claims of the study (arXiv 2605.13652), each as a test over seeds with an effect, an interval and a verdict."""

from hf_lowrank.claims.claim import VERDICT_WORDS, Claim, Detail, read_claims, write_claims
from hf_lowrank.claims.examine import claims_table, examine

__all__ = ["VERDICT_WORDS", "Claim", "Detail", "claims_table", "examine", "read_claims", "write_claims"]
