"""The module as a Space: measures one checkpoint against another and shows a table of metrics."""

import tempfile
from pathlib import Path

import evaluate
import gradio as gr

MODULE = evaluate.load(str(Path(__file__).with_name("lowrank_geometry.py")))


def compare(checkpoint: str, baseline: str, evaluation_text: str) -> list[list[str]]:
    """Rows of (metric, value or the reason for having none)."""
    with tempfile.TemporaryDirectory() as folder:
        options = {}
        if evaluation_text.strip():
            text = Path(folder) / "evaluation.txt"
            text.write_text(evaluation_text, encoding="utf-8")
            options["evaluation_set"] = str(text)
        try:
            result = MODULE.compute(predictions=[checkpoint.strip()], references=[baseline.strip()], **options)
        except ValueError as error:
            raise gr.Error(str(error)) from None
    (reasons,), (remarks,) = result.pop("reasons"), result.pop("remarks")
    said = {name: f" ({remark})" for name, remark in remarks.items()}
    return [
        [name, f"{v:.6g}{said.get(name, '')}" if v is not None else reasons[name]] for name, (v,) in result.items()
    ]


demo = gr.Interface(
    fn=compare,
    inputs=[
        gr.Textbox(label="Checkpoint", placeholder="user/repo@step-1000"),
        gr.Textbox(label="Baseline", placeholder="user/full-rank-repo@step-1000"),
        gr.Textbox(label="Held-out text (empty: the run's own sequences)", lines=6),
    ],
    outputs=gr.Dataframe(headers=["metric", "value"], label="The sixteen"),
    title="Geometry of low-rank pre-training",
    description=MODULE.info.description,
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
