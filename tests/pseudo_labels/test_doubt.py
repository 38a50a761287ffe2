"""What is kept of logits: the class, the doubt, the most probable classes, exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lambdanets.pseudo_labels.doubt import rows_of


def rows(*logits, top=10):
    return rows_of(np.array(logits, np.float32), top)


def test_doubt_is_right_where_the_confidence_is_one():
    found = rows((20, 0, 0), (21, 0, 0))
    assert found.doubt[0] == pytest.approx(4.122307e-09, rel=1e-6)
    assert found.confidence.tolist() == [1.0, 1.0]
    assert found.doubt[1] < found.doubt[0]


def test_ten_thousand_sure_pictures_are_ordered_as_float64_orders_them():
    draw = np.random.default_rng(0)
    logits = np.zeros((10_000, 5), np.float32)
    logits[np.arange(10_000), draw.integers(0, 5, 10_000)] = draw.uniform(5, 60, 10_000)
    exact = np.sort(np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True)), axis=1)[:, :-1].sum(1)
    doubt = rows_of(logits, 5).doubt.astype(np.float64)
    order = np.argsort(exact, kind="stable")
    assert (np.diff(doubt[order]) >= 0).all()
    assert (doubt > 0).all()
    assert len(np.unique(doubt)) > 9_900


def test_of_equal_classes_the_smallest_number_comes_first():
    found = rows((1, 3, 3, 0, 3), top=4)
    assert found.number.tolist() == [1]
    assert found.top_class.tolist() == [[1, 2, 4, 0]]


def test_as_many_classes_are_kept_as_there_are():
    found = rows((0, 1, 2), top=10)
    assert found.top_class.tolist() == [[2, 1, 0]]
    assert found.top_prob.sum(dtype=np.float64) == pytest.approx(1, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(2, 7)),
        elements=st.sampled_from([-200.0, -3.0, -1.0, 0.0, 0.5, 0.5000001, 2.0, 90.0]),
    ),
    st.integers(1, 8),
)
def test_rows_equal_a_plain_computation(logits, top):
    found = rows_of(logits, top)
    for i, z in enumerate(logits.astype(np.float64)):
        p = np.exp(z - z.max())
        p /= p.sum()
        order = sorted(range(len(z)), key=lambda c, z=z: (-z[c], c))
        others = sum(sorted(p[c] for c in order[1:]))
        assert found.number[i] == order[0]
        assert found.top_class[i].tolist() == order[:top]
        assert found.doubt[i] == pytest.approx(others, rel=1e-6, abs=1e-45)
        assert found.confidence[i] == np.float32(1) - found.doubt[i]
        assert found.top_prob[i].tolist() == pytest.approx([p[c] for c in order[:top]], rel=1e-3, abs=1e-7)
