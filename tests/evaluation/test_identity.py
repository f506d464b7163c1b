"""A person is scored by the face: right, wrong and absent faces, in the score, the best step and in
`explain`."""

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
# The base draws other people, in all pictures but the last prompt's.
BASE = [*[WRONG] * 4, None, None]


@pytest.fixture
def encoders(encoders):
    """To CLIP and DINO all pictures are equally alike: only the faces can tell."""

    def blind(pictures) -> torch.Tensor:
        found = []
        for picture in pictures:
            vector = torch.zeros(257)
            vector[zlib.crc32(picture.tobytes()) % 256] = vector[256] = 1
            found.append(vector / 2**0.5)
        return torch.stack(found)

    made = replace(encoders)
    made.embed_clip_images = made.embed_dino_images = blind
    made.embed_clip_texts = lambda texts: torch.eye(257)[[256] * len(texts)]
    return made


def scored(encoders, colours: list, base: list = BASE) -> Evaluation:
    """Pictures with these faces, by an adapter, where a base draws those of `base`."""

    def draw(requests, on):
        faces = colours if on else base
        return [painted(face, seed=50 + n) for n, face in enumerate(faces[: len(requests)])]

    return Evaluator(PLAN, encoders, PHOTOS, faces=READER)(draw)


def test_right_faces_score_above_wrong_ones_and_absent_ones_are_counted_apart(encoders):
    right, wrong, absent = (
        scored(encoders, [*[face] * 4, None, None]) for face in (RIGHT, WRONG, None)
    )
    # As the base shows no face far away, the right ones are whole.
    own = right.mean("identity_of_photos")
    assert right.mean("identity") == pytest.approx(own, abs=0.02) and own > 0.95
    assert wrong.mean("identity") < 0.5 < own and right.mean("identity_base") < 0.5
    assert "identity" not in absent.tables and absent.mean("no_face") == 1
    assert right.mean("no_face") == right.mean("no_face_base") == pytest.approx(1 / 3)
    assert right.score > wrong.score > absent.score

    # A face in half of the pictures says as much of whose it is, and is fewer faces.
    half = scored(encoders, [RIGHT, None, RIGHT, None, None, None])
    assert half.mean("identity") == pytest.approx(right.mean("identity"), abs=0.01)
    assert half.mean("no_face") == pytest.approx(2 / 3) and half.score < right.score

    # Where the base shows no face either, only DINO can tell.
    far = scored(encoders, [None] * 6, base=[None] * 6)
    assert far.score == pytest.approx(
        metrics.compute_checkpoint_score(
            far.mean("dino"), far.mean("clip_t"), far.mean("clip_t_base"), far.alarm.share
        )
    )


def test_the_report_has_the_face_with_its_interval_beside_the_photos_own(encoders):
    found = scored(encoders, [RIGHT, RIGHT, WRONG, WRONG, None, None])
    interval = found.interval("identity")
    assert interval.low < interval.mean < interval.high
    html = report.render_report(found, ABOUT, PHOTOS)
    assert f">{interval}<" in html and f">{found.interval('identity_of_photos')}<" in html
    assert "the mean of DINO and the face" in html
    scores = report.build_scores_json(found, ABOUT)["scores"]
    assert scores["identity"]["low"] and {"no_face", "identity_of_photos"} <= scores.keys()
    assert np.isfinite([value["mean"] for value in scores.values()]).all()

    # A thing has none of it, and photos without a face neither.
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
    for words in ("red rain jacket", "candle", "close-up portrait", "full-body", "far away"):
        assert words in prompts
    toy = replace(person, pretrained_model_name_or_path="toy")
    assert all("a photo of a {}" in template for template in build_subject_plan(toy, []).templates)


class Planted(TrainingEvaluator):
    """At the given steps the adapter draws these faces."""

    faces = {1: WRONG, 2: RIGHT, 3: None, 4: WRONG}  # noqa: RUF012

    def __call__(self, sampler, step):
        self.step = step
        return super().__call__(sampler, step)

    def _build_generator(self, sampler):
        def draw(requests, on):
            face = self.faces[self.step] if on else WRONG
            return [painted(face, seed=n) for n, _ in enumerate(requests)]

        return draw


def test_the_best_step_is_the_one_with_the_persons_face_and_explain_names_the_costume(
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
    train(config, evaluator=Planted(config, build_photo_report(config).photos, encoders))

    # The step of the right face is kept.
    events = logged(tmp_path / "anna", "evaluation")
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert events[-1]["best"]["step"] == 2 and events[2]["no_face"] == 1
    assert "identity" not in events[2] and events[1]["identity"] > events[0]["identity"]
    assert RunDir(tmp_path / "anna").best_dir.is_dir()
