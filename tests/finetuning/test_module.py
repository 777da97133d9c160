"""The module trains on means over a window, scores with four rows, saves only what it trains."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch.optim.optimizer import register_optimizer_step_post_hook

from medqlora.errors import CheckpointError
from medqlora.evaluation.scoring import letter_scores
from medqlora.schema import IGNORE
from tests.finetuning.conftest import LETTER_IDS, Loader, Rows, make_row


def final_gradients(module):
    return {n: p.grad.clone() for n, p in module.model.named_parameters() if p.requires_grad}


def fit_keeping_gradients(trainer, module, rows):
    """The gradients of the last update, which lets go of them."""
    kept = {}
    watch = register_optimizer_step_post_hook(lambda *_: kept.update(final_gradients(module)))
    trainer.fit(module, Loader(rows))
    watch.remove()
    return kept


@pytest.mark.parametrize("loss", ["choice", "token", "explanation"])
def test_an_update_is_the_mean_over_all_positions_of_the_window(
    loss, make_module, make_trainer, rows
):
    """Rows hold 4, 2 and 5 questions: the mean of three row means would weigh them wrongly."""
    window = rows[:3]
    module = make_module("none", "lora_r4", loss=loss, seed=3)
    trainer = make_trainer(max_steps=1, accumulate_grad_batches=3)
    ours = fit_keeping_gradients(trainer, module, window)

    other = make_module("none", "lora_r4", loss=loss, seed=3)
    other.model.train()
    sums = [other.loss(other.model, b, other.letter_rows, other.letter_ids) for b in window]
    (sum(s for s, _ in sums) / sum(c for _, c in sums)).backward()
    for name, expected in final_gradients(other).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-7, msg=name)
    assert sum(c for _, c in sums) == 11


def test_a_short_last_window_is_a_mean_as_well(make_module, make_trainer, rows):
    """Lightning divides by accumulate_grad_batches even where the epoch ends before it."""
    module = make_module("none", "lora_r4", seed=3, scheduler="constant")
    module.make_scheduler = None
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=4)
    ours = fit_keeping_gradients(trainer, module, rows[:1])
    other = make_module("none", "lora_r4", seed=3)
    other.model.train()
    total, count = other.loss(other.model, rows[0], other.letter_rows, other.letter_ids)
    (total / count).backward()
    for name, expected in final_gradients(other).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-7)


def test_clipping_sees_the_mean_and_not_the_sum(make_module, make_trainer, rows):
    module = make_module("none", "lora_r4")
    trainer = make_trainer(max_steps=1, gradient_clip_val=1e-3)
    gradients = fit_keeping_gradients(trainer, module, rows)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_gradients_do_not_outlive_an_update(make_module, make_trainer, rows):
    """They would be there in the next forward pass, where a step is at its largest."""
    module = make_module("none", "lora_r4")
    make_trainer(max_steps=2).fit(module, Loader(rows))
    assert all(p.grad is None for p in module.parameters())


def test_the_logged_loss_is_a_mean_per_question_in_nats(make_module, make_trainer, rows):
    module = make_module("none", "lora_r4")
    module.letter_rows.zero_()
    trainer = make_trainer(max_steps=1, accumulate_grad_batches=2)
    trainer.fit(module, Loader(rows))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(math.log(4))


def test_training_lowers_the_loss_of_the_rows_it_sees(make_module, make_trainer, rows):
    module = make_module("nf4", "lora_r16", optimizer="paged_adamw_8bit", steps=60)
    make_trainer(max_epochs=12, val_check_interval=1.0).fit(module, Rows(rows))
    trainer = make_trainer(limit_val_batches=5)
    trained = trainer.validate(module, Loader(rows), verbose=False)[0]["val/loss"]
    untrained = make_module("nf4", "lora_r16")
    start = make_trainer(limit_val_batches=5).validate(untrained, Loader(rows), verbose=False)[0]
    assert trained < 0.85 * start["val/loss"]


def test_validation_equals_stock_transformers_one_question_at_a_time(
    base, make_module, make_trainer, rows
):
    """Accuracy, loss and every score, with nothing packed, padded or cut away."""
    module = make_module("nf4", "lora_r4")
    result = make_trainer(limit_val_batches=5).validate(module, Loader(rows), verbose=False)[0]
    index, scores = module.predictions["val"].compute()

    stock = base("nf4")
    stock.set_attn_implementation("sdpa")
    expected, answers, numbers = [], [], []
    with torch.no_grad():
        for row in rows:
            for i in range(row.num_questions):
                question = row.input_ids[row.cu_seqlens[i] : row.cu_seqlens[i + 1]]
                logits = stock(question[None]).logits[0, -1]
                expected.append(logits[list(LETTER_IDS)].float().log_softmax(-1))
                answers.append(row.answer[i])
                numbers.append(row.index[i])
    order = torch.stack(numbers).argsort()
    expected, answers = torch.stack(expected)[order], torch.stack(answers)[order]
    assert torch.equal(index, torch.stack(numbers)[order])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    loss = F.nll_loss(expected, answers)
    assert result["val/loss"] == pytest.approx(loss.item(), abs=1e-4)
    accuracy = (expected.argmax(-1) == answers).float().mean()
    assert result["val/accuracy"] == pytest.approx(accuracy.item())


def test_questions_without_a_label_are_scored_and_not_counted(make_module, make_trainer, rows):
    module = make_module("nf4", "lora_r4")
    unlabelled = dataclasses.replace(rows[0], answer=torch.full_like(rows[0].answer, IGNORE))
    trainer = make_trainer(limit_test_batches=2)
    both = trainer.test(module, Loader([unlabelled, rows[1]]), verbose=False)[0]
    index, _ = module.predictions["test"].compute()
    assert len(index) == rows[0].num_questions + rows[1].num_questions
    alone = trainer.test(module, Loader([rows[1]]), verbose=False)[0]
    assert both["test/accuracy"] == alone["test/accuracy"]
    assert both["test/loss"] == pytest.approx(alone["test/loss"])


def test_predict_gives_row_numbers_and_scores(make_module, make_trainer, rows):
    module = make_module("nf4", "lora_r4").eval()
    ((index, scores),) = make_trainer().predict(module, Loader(rows[:1]))
    assert torch.equal(index, rows[0].index)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(6))
    with torch.no_grad():
        from medqlora.acceleration import last_hidden

        expected = letter_scores(last_hidden(module.model, rows[0]), module.letter_rows)
    assert torch.equal(scores, expected)


def test_dropout_is_on_in_training_and_off_in_validation(make_module, make_trainer, rows):
    """The base is loaded in eval mode, and Lightning keeps the mode it finds."""
    modes = {}

    class Modes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            modes["train"] = pl_module.model.training

        def on_validation_batch_end(self, trainer, pl_module, *args):
            modes["val"] = pl_module.model.training

    module = make_module("nf4", "lora_r4", overrides=("peft.lora_dropout=0.5",))
    make_trainer(max_steps=1, limit_val_batches=1, callbacks=[Modes()]).fit(
        module, Loader(rows[:1]), Loader(rows[:1])
    )
    assert modes == {"train": True, "val": False}


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(
    make_module, make_trainer, rows, tmp_path
):
    module = make_module("nf4", "lora_r4")
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, Loader(rows))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {
        f"model.{n}" for n, p in module.model.named_parameters() if p.requires_grad
    }
    assert all("lora_" in name for name in state)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_every_trained_weight_must_load(make_module, make_trainer, rows, damage):
    module = make_module("nf4", "lora_r4")
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, Loader(rows))
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    name = next(iter(checkpoint["state_dict"]))
    if damage == "missing":
        del checkpoint["state_dict"][name]
    elif damage == "extra":
        checkpoint["state_dict"]["model.other"] = torch.zeros(1)
    else:
        checkpoint["state_dict"][name] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="1 weights differ") as error:
        module.on_load_checkpoint(checkpoint)
    assert "\n" not in str(error.value)


def test_gradient_checkpointing_trains_to_the_same_adapter(make_module, make_trainer, rows):
    from medqlora.acceleration import prepare_for_training

    results = []
    for checkpointing in (False, True):
        module = make_module("nf4", "lora_r4", seed=5)
        prepare_for_training(module.model, gradient_checkpointing=checkpointing)
        make_trainer(max_steps=3).fit(module, Rows(rows))
        results.append([p for p in module.model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_long_and_short_rows_train_alike(make_module):
    """The same questions in one row or in two give the same gradient."""
    one = make_row((5, 9, 3, 12), 0)
    module = make_module("none", "lora_r4", seed=3)
    total, _ = module.loss(module.model, one, module.letter_rows, module.letter_ids)
    total.backward()
    joint = final_gradients(module)

    module = make_module("none", "lora_r4", seed=3)
    for first, last in ((0, 2), (2, 4)):
        start, end = int(one.cu_seqlens[first]), int(one.cu_seqlens[last])
        ids, positions = torch.zeros(40, dtype=torch.long), torch.zeros(40, dtype=torch.long)
        ids[: end - start] = one.input_ids[start:end]
        positions[: end - start] = one.position_ids[start:end]
        cu = (one.cu_seqlens[first : last + 1] - start).tolist()
        part = dataclasses.replace(
            one,
            input_ids=ids,
            position_ids=positions,
            cu_seqlens=torch.tensor([*cu, *[cu[-1]] * 4], dtype=torch.int32),
            last=torch.tensor([*(one.last[first:last] - start).tolist(), 0, 0, 0, 0]),
            answer=torch.tensor([*one.answer[first:last].tolist(), *[IGNORE] * 4]),
        )
        module.loss(module.model, part, module.letter_rows, module.letter_ids)[0].backward()
    for name, expected in final_gradients(module).items():
        torch.testing.assert_close(joint[name], expected, rtol=1e-4, atol=1e-6)
