"""Losses against PyTorch and hand-computed cases, for every reading of the joint loss."""

import doctest
import itertools
import math
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rqv2_jax import config
from rqv2_jax.models import losses
from rqv2_jax.training import stages

SWITCHES = ("kl_direction", "kl_reduction", "teacher_gradient", "reranker_loss")
READINGS = list(
    itertools.product(
        losses.KL_DIRECTIONS, losses.KL_REDUCTIONS, (True, False), losses.RERANKER_LOSSES
    )
)
PAPER, OFFICIAL = (
    tuple(config.LOSSES[preset][switch] for switch in SWITCHES)
    for preset in ("paper", "official_code")
)
LENGTHS = (5, 1, 3, 4, 2)
WHERE = np.arange(5) < np.array(LENGTHS)[:, None]
SCORES = hnp.arrays(np.float32, (5, 5), elements=st.floats(-30, 30, width=32))
POSITIVES = st.tuples(*(st.integers(0, n - 1) for n in LENGTHS))


def one_hot(positives):
    return np.arange(5) == np.array(positives)[:, None]


def distil(retriever, reranker, positive, where, temperature, reading):
    return losses.joint_distillation(
        jnp.asarray(retriever),
        jnp.asarray(reranker),
        positive,
        where_BxP=where,
        temperature=temperature,
        **dict(zip(SWITCHES, reading)),
    )


@jax.jit
def every_reading(retriever, reranker, positive, where, temperature=1.0):
    """{reading: ((loss, terms), (retriever gradient, re-ranker gradient))}, compiled at once."""

    def one(reading):
        def loss(retriever, reranker):
            return distil(retriever, reranker, positive, where, temperature, reading)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(retriever, reranker)

    return [one(reading) for reading in READINGS]


def joint(*arguments):
    """{reading: (loss, gradients)} in numpy, and {reading: terms}."""
    results = jax.device_get(every_reading(*arguments))
    values = {r: (value, grads) for r, ((value, _), grads) in zip(READINGS, results)}
    return values, {r: terms for r, ((_, terms), _) in zip(READINGS, results)}


def torch_joint(retriever, reranker, positive, where, temperature, reading):
    """The joint loss list by list, on what a list really holds, from PyTorch's own functions."""
    kl_direction, kl_reduction, teacher_gradient, reranker_loss = reading
    scores = [torch.tensor(np.float64(s), requires_grad=True) for s in (retriever, reranker)]
    kl_terms, listwise, pointwise = [], [], []
    for b in range(len(where)):
        student_scores, teacher_scores = (s[b][torch.tensor(where[b])] for s in scores)
        if not len(student_scores):
            continue
        student_log = F.log_softmax(student_scores / temperature, dim=0)
        teacher_log = F.log_softmax(teacher_scores / temperature, dim=0)
        if not teacher_gradient:
            teacher_log = teacher_log.detach()
        # F.kl_div(input, target) is KL(target || input).
        if kl_direction == "retriever_to_reranker":
            kl = F.kl_div(teacher_log, student_log, reduction="sum", log_target=True)
        else:
            kl = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
        kl_terms.append(kl)
        target = torch.tensor(positive[b][where[b]]).double()
        if target.any():
            listwise.append(F.cross_entropy(teacher_scores[None], target.argmax()[None]))
        pointwise.append(
            F.binary_cross_entropy_with_logits(teacher_scores, target, reduction="none")
        )
    divisor = {"sum": 1, "mean_per_list": len(kl_terms), "mean_per_candidate": where.sum()}
    supervised = {"listwise": torch.stack(listwise), "pointwise": torch.cat(pointwise)}
    loss = torch.stack(kl_terms).sum() / divisor[kl_reduction] + supervised[reranker_loss].mean()
    loss.backward()
    return loss.item(), [s.grad.numpy() for s in scores]


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
    for our_grad, their_grad in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(our_grad, their_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("spread", [0.1, 3, 10])
def test_every_reading_agrees_with_pytorch(spread, temperature):
    rng = np.random.default_rng(0)
    scores = rng.normal(0, spread, (2, 5, 5)).astype(np.float32)
    arguments = (*scores, one_hot([rng.integers(n) for n in LENGTHS]), WHERE, temperature)
    ours, _ = joint(*arguments)
    for reading in READINGS:
        assert_same(ours[reading], torch_joint(*arguments, reading))


@settings(max_examples=40, deadline=None)
@given(SCORES, SCORES, POSITIVES, st.sampled_from(READINGS))
def test_any_lists_agree_with_pytorch(retriever, reranker, positives, reading):
    for parts, tolerance in ((3, 1e-5), (1, 5e-5)):  # float32 rounds what is 60 nats apart
        arguments = (retriever / parts, reranker / parts, one_hot(positives), WHERE, 1.0)
        ours, theirs = joint(*arguments)[0][reading], torch_joint(*arguments, reading)
        assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize(
    ("kl_reduction", "reduction"),
    [("sum", "sum"), ("mean_per_list", "batchmean"), ("mean_per_candidate", "mean")],
)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_reductions_are_those_of_kl_div(kl_reduction, reduction):
    retriever, reranker = np.random.default_rng(1).normal(0, 2, (2, 5, 5)).astype(np.float32)
    student, teacher = (torch.tensor(s).log_softmax(-1) for s in (retriever, reranker))
    everything = np.ones((5, 5), bool)
    _, terms = joint(retriever, reranker, np.eye(5, dtype=bool), everything)
    expected = F.kl_div(student, teacher.exp(), reduction=reduction)
    reading = ("reranker_to_retriever", kl_reduction, False, "listwise")
    assert float(terms[reading]["kl"]) == pytest.approx(expected.item(), rel=1e-5)


# Retriever 1/4, 3/4 and re-ranker 1/2, 1/2; a second list of three with equal distributions.
HAND = (
    np.float32([[0, math.log(3), 9], [1, 2, 3]]),
    np.float32([[0, 0, -9], [3, 4, 5]]),
    np.array([[True, False, False], [False, False, True]]),
    np.array([[True, True, False], [True, True, True]]),
)
HAND_KL = {
    "retriever_to_reranker": 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2),
    "reranker_to_retriever": 1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3),
}
HAND_DIVISOR = {"sum": 1, "mean_per_list": 2, "mean_per_candidate": 5}
# -log softmax of the highest of three scores one apart.
LOG_Z = math.log(1 + math.exp(-1) + math.exp(-2))
HAND_SUPERVISED = {
    "listwise": (math.log(2) + LOG_Z) / 2,
    "pointwise": (2 * math.log(2) + sum(math.log(1 + math.exp(s)) for s in (3, 4, -5))) / 5,
}


@pytest.mark.parametrize("reading", READINGS)
def test_hand_computed(reading):
    loss, terms = distil(*HAND, 1.0, reading)
    kl_direction, kl_reduction, _, reranker_loss = reading
    kl = HAND_KL[kl_direction] / HAND_DIVISOR[kl_reduction]
    supervised = HAND_SUPERVISED[reranker_loss]
    second = sum((LOG_Z + x) * math.exp(-x - LOG_Z) for x in range(3))
    assert terms.keys() == {"loss", "kl", "supervised", "retriever_entropy", "reranker_entropy"}
    assert float(terms["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(terms["supervised"]) == pytest.approx(supervised, rel=1e-5)
    assert float(loss) == float(terms["loss"]) == pytest.approx(kl + supervised, rel=1e-5)
    first = 1 / 4 * math.log(4) + 3 / 4 * math.log(4 / 3)
    assert float(terms["retriever_entropy"]) == pytest.approx((first + second) / 2, rel=1e-5)
    assert float(terms["reranker_entropy"]) == pytest.approx((math.log(2) + second) / 2, rel=1e-5)


def test_worked_examples_of_the_documentation():
    path = pathlib.Path(__file__).parent.parent / "docs" / "method.md"
    found = doctest.testfile(str(path), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0


def test_presets_are_the_paper_and_the_release():
    """Equation 4 sums KL(retriever || re-ranker); the release takes the mean the other way round."""
    retriever, reranker = np.random.default_rng(2).normal(0, 2, (2, 5, 5)).astype(np.float32)
    positive, everything = np.eye(5, dtype=bool), np.ones((5, 5), bool)
    p, q = (np.exp(s) / np.exp(s).sum(-1, keepdims=True) for s in (retriever, reranker))
    supervised = -np.log(q[positive]).mean()
    values, _ = joint(retriever, reranker, positive, everything)
    for reading, expected, through_kl in (
        (PAPER, (p * np.log(p / q)).sum(), True),
        (OFFICIAL, (q * np.log(q / p)).mean(), False),
    ):
        value, (_, teacher_grad) = values[reading]
        assert value == pytest.approx(expected + supervised, rel=1e-5)
        only_supervised = np.allclose(teacher_grad, (q - positive) / 5, atol=1e-6)
        assert only_supervised is not through_kl
    assert {config.LOSSES[preset]["temperature"] for preset in config.LOSSES} == {1.0}


def test_teacher_gradient():
    """Cut, KL leaves the re-ranker its supervised gradient alone, and the retriever the same."""
    scores = np.random.default_rng(3).normal(0, 2, (2, 5, 5)).astype(np.float32)
    positive = one_hot([0] * 5)
    values, _ = joint(*scores, positive, WHERE)
    for supervised in (losses.listwise, losses.pointwise):
        alone = jax.grad(lambda s: supervised(s, positive, where_BxP=WHERE))(scores[1])  # noqa: B023
        for direction, reduction in itertools.product(losses.KL_DIRECTIONS, losses.KL_REDUCTIONS):
            value, let = values[direction, reduction, True, supervised.__name__]
            cut_value, cut = values[direction, reduction, False, supervised.__name__]
            np.testing.assert_allclose(cut[1], alone, atol=1e-7)
            assert np.abs(let[1] - alone).max() > 1e-3
            np.testing.assert_allclose(cut[0], let[0], atol=1e-7)
            assert cut_value == pytest.approx(float(value), rel=1e-6)


def test_teacher_gradient_by_hand():
    """That of KL(p || q) in the re-ranker's scores is q - p, that of KL(q || p) q (log(q/p) - KL)."""
    p, q = np.array([1 / 4, 3 / 4]), np.array([1 / 2, 1 / 2])
    labels = np.array([[True, False]]), np.ones((1, 2), bool)
    supervised = q - [1, 0]
    released = q * (np.log(q / p) - HAND_KL["reranker_to_retriever"])
    for direction, kl in (("retriever_to_reranker", q - p), ("reranker_to_retriever", released)):
        for through in (True, False):
            reading = direction, "sum", through, "listwise"
            scores = np.float32(np.log([p])), np.float32(np.log([q]))
            grad = jax.grad(lambda s: distil(scores[0], s, *labels, 1.0, reading)[0])(scores[1])  # noqa: B023
            np.testing.assert_allclose(grad[0], supervised + through * kl, atol=1e-6)


def test_temperature_by_hand():
    """Scores of probabilities 1/10 and 9/10 have 1/4 and 3/4 at temperature 2."""
    scores = np.log(np.float32([[0.1, 0.9]])), np.log(np.float32([[0.5, 0.5]]))
    labels = np.array([[True, False]]), np.ones((1, 2), bool)
    for direction, kl in HAND_KL.items():
        _, terms = distil(*scores, *labels, 2.0, (direction, "sum", True, "listwise"))
        assert float(terms["kl"]) == pytest.approx(kl, rel=1e-5)
        assert float(terms["supervised"]) == pytest.approx(math.log(2), rel=1e-5)


def test_several_positives_by_hand():
    """Softmax 1/2, 1/4, 1/4: the mean of what each of two positives would cost alone."""
    scores = np.log(np.float32([[2, 1, 1]]))
    everything = np.ones((1, 3), bool)
    value = losses.listwise(scores, np.array([[True, True, False]]), where_BxP=everything)
    assert float(value) == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-5)


def test_only_kl_reaches_the_retriever(monkeypatch):
    monkeypatch.setattr(losses, "kl", lambda p, q, where_BxP: jnp.zeros(len(p)))
    scores = np.random.default_rng(4).normal(0, 2, (2, 5, 5)).astype(np.float32)
    for reading in (PAPER, OFFICIAL):
        retriever, reranker = jax.grad(
            lambda *s: distil(*s, one_hot([0] * 5), WHERE, 1.0, reading)[0],  # noqa: B023
            argnums=(0, 1),
        )(*scores)
        np.testing.assert_array_equal(retriever, 0)
        assert np.abs(reranker).max() > 0.01


def test_equal_distributions_leave_nothing_to_distil():
    scores = np.random.default_rng(5).normal(0, 3, (5, 5)).astype(np.float32)
    # Softmax does not see a shift.
    values, terms = joint(scores, scores + 1, one_hot([0] * 5), WHERE)
    for reading in READINGS:
        assert float(terms[reading]["kl"]) == pytest.approx(0, abs=1e-5)
        np.testing.assert_allclose(values[reading][1][0], 0, atol=1e-5)
        entropies = terms[reading]["retriever_entropy"], terms[reading]["reranker_entropy"]
        assert float(entropies[0]) == pytest.approx(float(entropies[1]), rel=1e-5)


def test_temperature_divides_both_scores_inside_kl_alone():
    scores = np.random.default_rng(6).normal(0, 3, (2, 5, 5)).astype(np.float32)
    labels = (one_hot([0] * 5), WHERE)
    _, plain = joint(*scores, *labels, 1.0)
    _, scaled = joint(*(2 * scores), *labels, 2.0)
    _, softer = joint(*scores, *labels, 2.0)
    for reading in READINGS:
        for key in ("kl", "retriever_entropy", "reranker_entropy"):
            assert float(scaled[reading][key]) == pytest.approx(
                float(plain[reading][key]), rel=1e-5
            )
        assert float(softer[reading]["kl"]) < float(plain[reading]["kl"]) / 2
        assert softer[reading]["supervised"] == plain[reading]["supervised"]
        assert scaled[reading]["supervised"] != plain[reading]["supervised"]


@pytest.mark.parametrize("temperature", [1.0, 1e-9])
@pytest.mark.parametrize("size", [1e4, 1e30, np.finfo(np.float32).max, math.inf])
def test_gradients_are_finite_for_extreme_scores(size, temperature):
    signs = np.random.default_rng(7).integers(-1, 2, (2, 4, 5, 5))
    extreme = np.where(signs == 0, 0, np.copysign(np.float32(size), signs)).astype(np.float32)
    for retriever, reranker in extreme.swapaxes(0, 1):
        values, _ = joint(retriever, reranker, one_hot([0] * 5), WHERE, temperature)
        for value, grads in values.values():
            assert np.isfinite(value)
            for grad in grads:
                assert np.isfinite(grad).all()
                np.testing.assert_array_equal(grad[~WHERE], 0)


def test_lists_of_one_passage_teach_only_pointwise():
    scores, where = np.float32([[3], [-1e30], [0]]), np.array([[True], [True], [False]])
    for reading in (PAPER, OFFICIAL, (*PAPER[:3], "pointwise")):
        value, grads = jax.value_and_grad(
            lambda *s: distil(*s, where, where, 1.0, reading)[0],  # noqa: B023
            argnums=(0, 1),
        )(scores, -scores)
        np.testing.assert_array_equal(grads[0], 0)
        if reading[-1] == "listwise":
            assert value == 0
            np.testing.assert_array_equal(grads[1], 0)
        else:
            assert value == pytest.approx(math.log(1 + math.exp(3)) / 2, rel=1e-6)
            assert np.isfinite(grads[1]).all()


def test_masked_entries_neither_count_nor_get_a_gradient():
    scores = np.random.default_rng(8).normal(0, 2, (2, 5, 5)).astype(np.float32)
    positive = one_hot([0] * 5)
    clean, clean_terms = joint(*scores, positive, WHERE)
    for garbage in (math.nan, math.inf, -math.inf, 1e38, -1e38, 100.0):
        dirty = np.where(WHERE, scores, np.float32(garbage))
        # A positive that does not exist is none.
        values, terms = joint(*dirty, positive | ~WHERE, WHERE)
        for reading in READINGS:
            assert terms[reading] == clean_terms[reading]
            for grad, dirty_grad in zip(clean[reading][1], values[reading][1]):
                np.testing.assert_array_equal(dirty_grad, grad)
                np.testing.assert_array_equal(dirty_grad[~WHERE], 0)


@pytest.mark.parametrize("low", [-1e4, -1e9, -1e30, -3e38, -math.inf])
def test_masked_entries_take_no_probability_however_low_the_others_are(low):
    retriever = np.where(one_hot([0, 1, 2, 3, 4]), np.float32(0), np.float32(low))
    reranker = np.zeros((5, 5), np.float32)
    where = ~np.eye(5, dtype=bool)
    _, terms = joint(retriever, reranker, one_hot([1, 0, 0, 0, 0]), where)
    for reading in READINGS:
        assert float(terms[reading]["retriever_entropy"]) == pytest.approx(math.log(4), rel=1e-5)
        assert float(terms[reading]["kl"]) == pytest.approx(0, abs=1e-5)


def test_kl_and_entropy_count_valid_passages_alone():
    p, q = np.log([[0.5, 0.3, 0.2]]), np.log([[0.25, 0.25, 0.5]])
    where = np.array([[True, False, True]])
    kl = losses.kl(p, q, where_BxP=where)
    assert kl == pytest.approx(0.5 * math.log(2) + 0.2 * math.log(0.4), rel=1e-5)
    entropy = losses.entropy(p, where_BxP=where)
    assert entropy == pytest.approx(-0.5 * math.log(0.5) - 0.2 * math.log(0.2), rel=1e-5)


def test_a_teacher_is_followed_where_it_has_a_score():
    rng = np.random.default_rng(12)
    teacher, scores = rng.normal(0, 2, (2, 3, 5)).astype(np.float32)
    teacher[0, 2] = teacher[1, :4] = teacher[2] = np.nan
    where = np.ones((3, 5), bool)
    where[0, 4] = False
    value, grad = jax.value_and_grad(lambda s: losses.taught(teacher, s, where_BxP=where))(scores)
    # The first list has three scores; the second one, which says nothing; the third none.
    known = [0, 1, 3]
    expected = F.kl_div(
        torch.tensor(scores[0, known]).log_softmax(-1),
        torch.tensor(teacher[0, known]).softmax(-1),
        reduction="sum",
    )
    assert float(value) == pytest.approx(expected.item() / 2, rel=1e-5)
    assert np.isfinite(grad).all()
    assert np.abs(grad[0, known]).min() > 0
    np.testing.assert_array_equal(grad[0, [2, 4]], 0)
    np.testing.assert_allclose(grad[1:], 0, atol=1e-7)


def test_the_warm_up_adds_its_teacher_by_weight_and_temperature():
    rng = np.random.default_rng(13)
    scores, teacher = rng.normal(0, 2, (2, 3, 4)).astype(np.float32)
    teacher[1, 2] = np.nan
    labels = {"positive": np.eye(3, 4, dtype=bool), "where": np.ones((3, 4), bool)}
    models = SimpleNamespace(reranker_scores=lambda params, packed, key: params.reshape(-1))
    stage = {"loss": "listwise", "teacher_weight": 0.3, "teacher_temperature": 2.0}

    def loss(batch):
        params, key = {"reranker": scores}, None
        batch = {"pairs": None, **batch}
        return stages.reranker_loss(models, stage, params, batch, key, lambda x: x)

    alone, terms = loss(labels)
    supervised = float(losses.listwise(scores, labels["positive"], where_BxP=labels["where"]))
    assert (float(alone), terms.keys()) == (pytest.approx(supervised), {"loss"})
    both, terms = loss(labels | {"teacher": teacher})
    taught = float(losses.taught(teacher / 2, scores, where_BxP=labels["where"]))
    assert taught > 0.1
    assert float(both) == pytest.approx(supervised + 0.3 * taught, rel=1e-5)
    assert float(terms["teacher"]) == pytest.approx(taught, rel=1e-5)


def test_a_list_of_nothing_changes_nothing():
    scores = np.random.default_rng(9).normal(0, 2, (2, 5, 5)).astype(np.float32)
    where = WHERE.copy()
    where[2] = False
    arguments = (*scores, one_hot([0] * 5), where, 1.0)
    values, _ = joint(*arguments)
    for reading in READINGS:
        assert_same(values[reading], torch_joint(*arguments, reading))
        for grad in values[reading][1]:
            np.testing.assert_array_equal(grad[2], 0)
    nothing = np.zeros((5, 5), bool)
    values, terms = joint(*scores, one_hot([0] * 5), nothing)
    for reading in READINGS:
        assert set(map(float, terms[reading].values())) == {0.0}
        np.testing.assert_array_equal(values[reading][1], 0)


def test_listwise_leaves_out_lists_without_a_positive():
    scores = np.random.default_rng(10).normal(0, 2, (3, 5)).astype(np.float32)
    positive, everything = np.eye(3, 5, dtype=bool), np.ones((3, 5), bool)
    positive[1] = False
    value, grad = jax.value_and_grad(lambda s: losses.listwise(s, positive, where_BxP=everything))(
        scores
    )
    expected = F.cross_entropy(torch.tensor(scores[[0, 2]]), torch.tensor([0, 2]))
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_array_equal(grad[1], 0)


@settings(max_examples=15, deadline=None)
@given(SCORES, SCORES, POSITIVES, st.permutations(range(5)), st.permutations(range(5)))
def test_order_of_lists_and_passages_changes_nothing(retriever, reranker, positives, rows, columns):
    order = np.ix_(rows, columns)
    arrays = (retriever, reranker, one_hot(positives), WHERE)
    values, _ = joint(*arrays)
    moved, _ = joint(*(a[order] for a in arrays))
    for reading in READINGS:
        value, grads = values[reading]
        assert_same(moved[reading], (value, [g[order] for g in grads]), tolerance=5e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_half_precision_scores_are_computed_in_float32(temperature):
    scores = jnp.asarray(np.random.default_rng(11).normal(0, 9, (2, 5, 5)), jnp.bfloat16)
    labels = (one_hot([0] * 5), WHERE, temperature)
    for reading in (PAPER, OFFICIAL):
        _, terms = distil(*scores, *labels, reading)
        _, exact = distil(*scores.astype(jnp.float32), *labels, reading)
        for key, value in terms.items():
            assert value.dtype == jnp.float32
            assert float(value) == pytest.approx(float(exact[key]), rel=1e-6), key


@pytest.mark.parametrize("switch", ["kl_direction", "kl_reduction", "reranker_loss"])
def test_unknown_choices_raise(switch):
    reading = [("mean" if name == switch else choice) for name, choice in zip(SWITCHES, PAPER)]
    with pytest.raises(ValueError, match=f"{switch} is 'mean'"):
        distil(*HAND, 1.0, reading)
