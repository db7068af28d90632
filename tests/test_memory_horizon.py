"""The Memory Horizon task: the solver against a loop, what the sequences are like, a run that can be killed."""

import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from llamba_ref.gateloop import gateloop
from llamba_ref.gateloop_lm import GateLoopConfig, GateLoopLM
from llamba_ref.memory_horizon import horizon_accuracy, horizon_sequences, horizon_targets, since_reset
from llamba_ref.training import CrossEntropy, FreshBatches, Run, Stage, train


def by_hand(row, modulus):
    """Distances and sums of one sequence, token by token."""
    distances, sums, distance, total = [], [], -1, 0
    for token in row:
        distance, total = (0, 0) if token == modulus else (distance + 1, (total + token) % modulus)
        distances.append(distance)
        sums.append(total)
    return distances, sums


def small_model():
    return GateLoopLM(GateLoopConfig(vocab_size=6, d_model=8, n_layer=2, n_heads=8, intermediate_size=16, mode="scan",
                                     tie_embeddings=False))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), modulus=st.integers(1, 12), length=st.integers(1, 60), batch=st.integers(1, 3))
def test_solver_is_the_loop(data, modulus, length, batch):
    """Any tokens, also sequences that do not begin with a reset."""
    token = st.integers(0, modulus)
    rows = data.draw(st.lists(st.lists(token, min_size=length, max_size=length), min_size=batch, max_size=batch))
    ids = torch.tensor(rows)
    distances, sums = zip(*(by_hand(row, modulus) for row in rows))
    assert since_reset(ids, modulus).tolist() == list(distances)
    assert horizon_targets(ids, modulus).tolist() == list(sums)


@pytest.mark.parametrize("modulus", [2, 5, 9])
def test_what_sequences_hold(modulus):
    ids = horizon_sequences(200, 128, modulus, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (200, 128) and ids.dtype == torch.int64 and (ids[:, 0] == modulus).all()
    assert set(ids.unique().tolist()) == set(range(modulus + 1))
    digits = ids[ids < modulus].bincount().double()
    assert (digits / digits.mean() - 1).abs().max() < 0.1
    again = horizon_sequences(200, 128, modulus, generator=torch.Generator().manual_seed(0))
    other = horizon_sequences(200, 128, modulus, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ids, again) and not torch.equal(ids, other)


@pytest.mark.parametrize("shortest, length", [(4, 4096), (16, 4096), (64, 32)])
def test_resets_are_spread_log_uniformly(shortest, length):
    """The rate of a sequence is drawn from 1 / length to 1 / shortest; its mean is known in closed form."""
    ids = horizon_sequences(2000, length, shortest=shortest, generator=torch.Generator().manual_seed(0))
    found = (ids[:, 1:] == 5).double().mean().item()
    spread = math.log(max(1, length / shortest))
    wanted = (1 / shortest - 1 / length) / spread if spread else 1 / shortest
    assert abs(found / wanted - 1) < 0.1


def test_one_complex_channel_solves_it():
    ids = horizon_sequences(2, 5000, 7, generator=torch.Generator().manual_seed(0))
    reset = (ids == 7)[..., None, None]
    one = torch.ones(2, 5000, 1, 1)
    log_a, phase = (
        torch.zeros_like(one).masked_fill(reset, -torch.inf),
        2 * math.pi * ids[..., None, None].masked_fill(reset, 0) / 7,
    )
    hours = torch.polar(torch.ones(7), 2 * math.pi * torch.arange(7) / 7)
    for mode in ("recurrent", "scan", "chunked"):
        clock = gateloop(one, reset.float(), one, log_a, phase, mode=mode).squeeze(-1)
        assert torch.equal((clock * hours.conj()).real.argmax(-1), horizon_targets(ids, 7)), mode


def test_accuracy_by_distance():
    ids = torch.tensor([[5, 1, 2, 3, 5, 4]])

    def model(input_ids):
        """Right up to a distance of 1."""
        guess = torch.where(
            since_reset(input_ids) < 2, horizon_targets(input_ids), (horizon_targets(input_ids) + 1) % 5
        )
        return torch.nn.functional.one_hot(guess, 6).float()

    at_reset, near, far, beyond = horizon_accuracy(model, ids, [0, 1, 3, 4, 100])
    assert (at_reset, far) == (1.0, 0.0) and near == pytest.approx(2 / 3) and math.isnan(beyond)


def test_objective_is_the_cross_entropy_of_every_position():
    model, ids = small_model(), horizon_sequences(3, 20)
    losses = []
    part = CrossEntropy(model, horizon_targets)(ids, losses.append)
    logits = model(ids)
    expected = -logits.log_softmax(-1).gather(-1, horizon_targets(ids)[..., None]).mean()
    assert part.shape == (1,) and part.item() == pytest.approx(expected.item(), rel=1e-6)
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_run_goes_on_as_if_it_had_not_been_killed(tmp_path):
    def fit(path, steps_before_the_kill=None):
        """Train 6 steps, or start, be killed, and resume."""
        def kill(step, stage):
            if step == steps_before_the_kill:
                raise KeyboardInterrupt

        stages, results = [Stage("horizon", 6, 1e-2)], None
        for resume in (False, True)[: 1 if steps_before_the_kill is None else 2]:
            torch.manual_seed(0)
            model = small_model()
            try:
                data = FreshBatches(lambda step, generator: horizon_sequences(4, 32, generator=generator))
                objective = CrossEntropy(model, horizon_targets)
                train(model, stages, data, lambda stage: objective, run=Run(path, {}, resume=resume), save_every=2,
                      accelerator=Accelerator(), progress=False, after_step=None if resume else kill)
            except KeyboardInterrupt:
                continue
            results = model.state_dict()
        return results

    whole, resumed = fit(tmp_path / "whole"), fit(tmp_path / "killed", 5)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("sizes, message", [
    ({"batch": 0}, "batch is 0: it must be an integer of at least 1"),
    ({"length": -1}, "length is -1"),
    ({"modulus": 2.5}, "modulus is 2.5"),
    ({"shortest": 0}, "shortest is 0"),
])  # fmt: skip
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        horizon_sequences(**{"batch": 2, "length": 8, **sizes})
