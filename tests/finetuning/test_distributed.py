"""Two processes make the update that one makes with twice the rows."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

from tests.finetuning.conftest import Loader, make_row

SCRIPT = """
import sys
import torch
from lightning import Trainer
from tests.finetuning.conftest import LETTER_IDS, Loader, letter_rows, make_row, option
from medqlora.acceleration import use_packed_attention
from medqlora.finetuning import MCQAModule, attach_adapter
from medqlora.quantization import QuantConfig, load_base

folder, out = sys.argv[1:]
torch.manual_seed(3)
model = load_base(folder, QuantConfig("nf4", True, "float32"))
use_packed_attention(model)
letters = letter_rows(model, LETTER_IDS)
model = attach_adapter(model, option("peft", "lora_r4"))
module = MCQAModule(
    model, letter_ids=LETTER_IDS, letter_rows=letters, loss=option("loss", "choice"),
    optimizer=option("optimizer", "adamw"), scheduler=option("scheduler", "constant"),
    num_training_steps=4,
)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=3, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    use_distributed_sampler=False, gradient_clip_val=1.0,
)
rank = trainer.global_rank
lengths = [(5, 9, 3, 12), (12, 12)]
trainer.fit(module, Loader([make_row(lengths[rank], seed=2 * i + rank) for i in range(3)]))
gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
row = make_row((4, 4), seed=50 + rank, first_index=10 * rank)
result = trainer.validate(module, Loader([row]), verbose=False)[0]
index = module.predictions["val"].compute()[0]
if rank == 0:
    torch.save({"gradients": gradients, "weights": weights, "val": result, "index": index}, out)
"""


def test_two_ranks_make_the_update_of_one_process_with_two_rows(
    make_module, make_trainer, gemma_folder, tmp_path
):
    """Ranks hold 4 and 2 questions: the mean of two means would weigh them wrongly."""
    script = tmp_path / "ddp.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    finished = subprocess.run(
        [*command, "--nproc-per-node=2", script, gemma_folder, tmp_path / "ddp.pt"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    theirs = torch.load(tmp_path / "ddp.pt", weights_only=False)

    module = make_module("nf4", "lora_r4", scheduler="constant", steps=4, seed=3)
    lengths = [(5, 9, 3, 12), (12, 12)]
    rows = [make_row(lengths[r], seed=2 * i + r) for i in range(3) for r in range(2)]

    trainer = make_trainer(max_steps=3, accumulate_grad_batches=2, gradient_clip_val=1.0)
    trainer.fit(module, Loader(rows))
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                theirs["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name
            )
            # AdamW turns rounding of a tiny gradient into a step of the whole learning rate.
            torch.testing.assert_close(theirs["weights"][name], parameter, rtol=0, atol=4e-4)
    validation = [make_row((4, 4), seed=50 + r, first_index=10 * r) for r in range(2)]
    trainer = make_trainer(limit_val_batches=2)
    ours = trainer.validate(module, Loader(validation), verbose=False)[0]
    assert abs(ours["val/loss"] - theirs["val"]["val/loss"]) < 1e-2
    assert theirs["index"].tolist() == [0, 1, 10, 11], "each question once, of both ranks"
