"""Scores of a person's face: right, wrong and absent faces, in the score, the best step and the
report."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.evaluation import metrics, report
from dreambooth_moslora.evaluation.during_training import TrainingEvaluator
from dreambooth_moslora.evaluation.protocol import EvaluationPlan, build_subject_plan
from dreambooth_moslora.evaluation.scoring import Evaluation, Evaluator
from dreambooth_moslora.photos.folder import build_photo_report
from dreambooth_moslora.settings.prompts import SubjectWords
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.loop import train
from tests.helpers.stub_faces import READER, RIGHT, WRONG, painted, stub_faces  # noqa: F401
from tests.helpers.tiny_training import logged, tiny_config

PLAN = EvaluationPlan(
    SubjectWords("sks", "woman"),
    ("a photo of a {} on the beach", "a {} in the snow", "a {} far away"),
    (),
    seeds=(0, 1),
    class_images=0,
)
PHOTOS = [painted((240, 0, 50 + 10 * n), seed=n) for n in range(4)]
ABOUT = report.ReportContext("anna", "base", ("clip", "dino"), 2, 7.0)
BASE = [*[WRONG] * 4, None, None]
"""Faces of the base: other people, and none at the last prompt."""


@pytest.fixture
def encoders(encoders):
    """Return encoders to which all images are equally alike: only the faces differ."""

    def embed_equally(pictures) -> torch.Tensor:
        vectors = []
        for picture in pictures:
            vector = torch.zeros(257)
            vector[zlib.crc32(picture.tobytes()) % 256] = vector[256] = 1
            vectors.append(vector / 2**0.5)
        return torch.stack(vectors)

    blind_encoders = replace(encoders)
    blind_encoders.embed_clip_images = blind_encoders.embed_dino_images = embed_equally
    blind_encoders.embed_clip_texts = lambda texts: torch.eye(257)[[256] * len(texts)]
    return blind_encoders


def evaluate_faces(encoders, colours: list, base: list = BASE) -> Evaluation:
    """Evaluate an adapter whose images show these faces, on a base with those of `base`."""

    def draw(requests, with_adapter):
        faces = colours if with_adapter else base
        return [painted(face, seed=50 + n) for n, face in enumerate(faces[: len(requests)])]

    return Evaluator(PLAN, encoders, PHOTOS, faces=READER)(draw)


def test_right_faces_score_above_wrong_and_absent_ones(encoders):
    right, wrong, absent = (
        evaluate_faces(encoders, [*[face] * 4, None, None]) for face in (RIGHT, WRONG, None)
    )
    # The right faces are complete, as the base shows none far away either.
    photo_identity = right.mean("identity_of_photos")
    assert (
        right.mean("identity") == pytest.approx(photo_identity, abs=0.02) and photo_identity > 0.95
    )
    assert wrong.mean("identity") < 0.5 < photo_identity and right.mean("identity_base") < 0.5
    assert "identity" not in absent.tables and absent.mean("no_face") == 1
    assert right.mean("no_face") == right.mean("no_face_base") == pytest.approx(1 / 3)
    assert right.score > wrong.score > absent.score

    # Fewer faces lower the score, not the identity.
    half = evaluate_faces(encoders, [RIGHT, None, RIGHT, None, None, None])
    assert half.mean("identity") == pytest.approx(right.mean("identity"), abs=0.01)
    assert half.mean("no_face") == pytest.approx(2 / 3) and half.score < right.score

    # Without a face of the base, only DINO counts.
    far = evaluate_faces(encoders, [None] * 6, base=[None] * 6)
    assert far.score == pytest.approx(
        metrics.compute_checkpoint_score(
            far.mean("dino"), far.mean("clip_t"), far.mean("clip_t_base"), far.alarm.share
        )
    )


def test_the_report_has_the_faces_of_images_and_photos(encoders):
    evaluation = evaluate_faces(encoders, [RIGHT, RIGHT, WRONG, WRONG, None, None])
    interval = evaluation.interval("identity")
    assert interval.low < interval.mean < interval.high
    html = report.render_report(evaluation, ABOUT, PHOTOS)
    assert f">{interval}<" in html and f">{evaluation.interval('identity_of_photos')}<" in html
    assert "the mean of DINO and the face" in html
    scores = report.build_scores_json(evaluation, ABOUT)["scores"]
    assert scores["identity"]["low"] and {"no_face", "identity_of_photos"} <= scores.keys()
    assert np.isfinite([value["mean"] for value in scores.values()]).all()

    # Identity is not scored for a thing, or for photos without a face.
    thing = Evaluator(PLAN, encoders, PHOTOS)
    nobody = Evaluator(PLAN, encoders, [painted(None)], faces=READER)
    assert thing.photo_faces is None and nobody.photo_faces is None


def test_a_persons_prompts_change_clothes_light_and_distance():
    person = TrainConfig(
        pretrained_model_name_or_path="some/base",
        instance_prompt="a photo of sks woman",
        subject="person",
    )
    prompts = " | ".join(build_subject_plan(person, []).templates)
    for phrase in ("red rain jacket", "candle", "close-up portrait", "full-body", "far away"):
        assert phrase in prompts
    toy = replace(person, pretrained_model_name_or_path="toy")
    assert all("a photo of a {}" in template for template in build_subject_plan(toy, []).templates)


class PlantedEvaluator(TrainingEvaluator):
    """Evaluator for which the adapter shows these faces, by step."""

    faces = {1: WRONG, 2: RIGHT, 3: None, 4: WRONG}  # noqa: RUF012

    def __call__(self, sampler, step):
        self.step = step
        return super().__call__(sampler, step)

    def _build_generator(self, sampler):
        def draw(requests, on):
            face = self.faces[self.step] if on else WRONG
            return [painted(face, seed=n) for n, _ in enumerate(requests)]

        return draw


def test_the_best_step_is_the_one_with_the_persons_face(
    tiny_base,
    encoders,
    stub_faces,  # noqa: F811
    tmp_path,
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, photo in enumerate(PHOTOS):
        photo.save(photos / f"{number}.png")
    config = tiny_config(
        tiny_base,
        photos,
        tmp_path / "anna",
        subject="person",
        instance_prompt="a photo of sks woman",
        max_train_steps=4,
        evaluate_steps=1,
    )
    encoders.faces = stub_faces
    train(config, evaluator=PlantedEvaluator(config, build_photo_report(config).photos, encoders))

    # The step of the right face is kept.
    events = logged(tmp_path / "anna", "evaluation")
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert events[-1]["best"]["step"] == 2 and events[2]["no_face"] == 1
    assert "identity" not in events[2] and events[1]["identity"] > events[0]["identity"]
    assert RunDir(tmp_path / "anna").best_dir.is_dir()
