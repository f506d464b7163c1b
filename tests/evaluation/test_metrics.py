"""The measures on vectors whose answers are known by hand, and on the properties that their definitions promise."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.evaluation.metrics import DEGREES, STUDENT, bootstrap_mean, student

E = torch.eye(4)
HALF = normalize(E[0] + E[1], dim=0)  # 45 degrees between the first two axes


def random_units(n: int, seed: int = 0, dim: int = 32) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def near(vectors: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    """The same vectors, each pushed a little aside."""
    return normalize(vectors + size * random_units(len(vectors), seed, vectors.shape[1]), dim=-1)


def test_subject_fidelity_is_the_mean_cosine_to_all_photos():
    found = metrics.subject_fidelity(torch.stack([E[0], HALF, E[2]]), E[:2])
    assert found.tolist() == pytest.approx([0.5, math.sqrt(0.5), 0.0])


def test_photos_among_themselves_leave_out_each_with_itself():
    assert metrics.photo_fidelity(torch.stack([E[0], E[0], E[1]])) == pytest.approx(1 / 3)
    assert math.isnan(metrics.photo_fidelity(E[:1]))


def test_prompt_fidelity_pairs_each_picture_with_its_own_text_and_shuffling_lowers_it():
    texts = random_units(8)
    pictures = near(texts, 0.5, seed=1)
    paired = metrics.prompt_fidelity(pictures, texts)
    assert paired.tolist() == pytest.approx([float(p @ t) for p, t in zip(pictures, texts)])
    assert metrics.prompt_fidelity(pictures, texts.roll(1, 0)).mean() < paired.mean()


def test_diversity_is_the_mean_distance_of_the_pairs_of_a_group():
    pictures, groups = [E[0], E[1], HALF, E[2]], ["a", "a", "a", "alone"]
    expected = (1 + 2 * (1 - math.sqrt(0.5))) / 3
    assert metrics.diversity(pictures, groups) == {"a": pytest.approx(expected)}


def test_diversity_takes_any_distance():
    assert metrics.diversity([E[0], E[1]], [0, 0], lambda a, b: float((a - b).abs().sum())) == {0: 2.0}


def test_drift_is_zero_for_equal_pictures_and_one_for_unrelated_ones():
    found = metrics.drift(torch.stack([HALF, E[0]]), torch.stack([HALF, E[1]]))
    assert found.tolist() == pytest.approx([0, 1], abs=1e-6)


def test_joint_vectors_have_the_mean_of_both_cosines():
    clip, dino = random_units(3, 0), random_units(3, 1, dim=16)
    joint = metrics.joint_vectors(clip, dino)
    assert torch.allclose(joint @ joint.T, (clip @ clip.T + dino @ dino.T) / 2, atol=1e-6)


def test_copy_index_is_one_at_a_photo_and_zero_at_the_photos_own_nearness():
    photos = torch.stack([E[0], HALF])
    index = metrics.copy_index(torch.stack([E[0], normalize(E[0] + E[2], dim=0)]), photos)
    assert index.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_copy_alarm_rings_for_copies_only_and_names_the_photo():
    subject = random_units(1, 5)
    photos = near(subject.repeat(5, 1), 0.6, seed=6)
    fresh, copies = near(subject.repeat(20, 1), 0.6, seed=7), near(photos, 0.05, seed=8)
    assert not metrics.copy_alarm(fresh, photos).raised
    mixed = metrics.copy_alarm(torch.cat([fresh, copies]), photos)
    assert mixed.raised and mixed.share == pytest.approx(5 / 25)
    assert mixed.picture == 20 + mixed.photo  # the worst picture is a copy of the photo that it names


def test_equal_photos_and_a_lone_photo_do_not_divide_by_zero():
    for photos in (E[:1].repeat(3, 1), E[:1]):
        assert metrics.copy_index(E[:1], photos).isfinite().all()
        assert metrics.copy_index(E[:1], photos)[0] == pytest.approx(1.0, abs=1e-5)


def test_background_leak_is_the_nearness_gained_over_the_base():
    leak = metrics.background_leak(torch.stack([E[0], E[2]]), torch.stack([E[2], E[2]]), E[:1])
    assert leak.tolist() == pytest.approx([1.0, 0.0])


def test_checkpoint_score_is_the_product_and_never_rewards_more_prompt_than_the_base():
    assert metrics.checkpoint_score(0.8, 0.3, 0.3, 0.0) == pytest.approx(0.8)
    assert metrics.checkpoint_score(0.8, 0.6, 0.3, 0.0) == pytest.approx(0.8)
    assert metrics.checkpoint_score(0.8, 0.15, 0.3, 0.25) == pytest.approx(0.8 * 0.5 * 0.75)
    assert metrics.checkpoint_score(-0.2, 0.3, 0.3, 0.0) == 0.0


@pytest.mark.parametrize("shape", [(6, 1), (6, 2), (12, 10), (16, 4), (3, 2)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(shape):
    rng, (rows, columns) = np.random.default_rng(0), shape
    hits = 0
    for trial in range(400):
        table = rng.normal(0, 1, (rows, 1)) + rng.normal(0, 0.5, (1, columns)) * (columns > 1) + rng.normal(0, 1, shape)
        found = bootstrap_mean(table, resamples=400, seed=trial)
        hits += found.low <= 0 <= found.high
    assert 0.93 <= hits / 400 <= 0.999


def test_students_table_holds_where_the_tail_of_the_density_is_a_fortieth():
    """With t = √ν·tan θ, Student's density is proportional to cos(θ)^(ν-1)."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    for degrees, point in zip(DEGREES[:-1], STUDENT[:-1], strict=True):
        density = np.cos((angles[1:] + angles[:-1]) / 2) ** (degrees - 1)
        tail = density[angles[1:] > np.arctan(point / np.sqrt(degrees))].sum() / density.sum()
        assert tail == pytest.approx(0.025, rel=2e-3)


def test_students_t_is_as_in_the_books_and_never_too_small_between():
    assert [student(n) for n in (1, 5, 30, np.inf)] == pytest.approx([12.706, 2.571, 2.042, 1.960])
    assert 2.201 <= student(11) < 2.22 and 2.093 <= student(19) < 2.11


def test_bootstrap_over_prompts_is_wider_than_if_all_pictures_were_independent():
    table = np.repeat(np.arange(6.0)[:, None], 50, axis=1)  # the prompt decides everything
    crossed, naive = bootstrap_mean(table), bootstrap_mean(table.ravel())
    assert crossed.mean == naive.mean == pytest.approx(2.5)
    assert crossed.high - crossed.low > 4 * (naive.high - naive.low)


def test_bootstrap_of_one_value_is_that_value_and_gaps_are_refused():
    assert bootstrap_mean(np.array([[0.3]])).low == pytest.approx(0.3)
    for bad in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="finite"):
            bootstrap_mean(bad)
