"""Loading of pretrained vision models: one request tells whether the hub can be reached."""

from typing import ClassVar

import huggingface_hub
import pytest

from dreambooth_moslora.photos import faces
from dreambooth_moslora.photos.pretrained import load_pretrained


class HubModel:
    """Class of transformers whose model is in the cache and on the hub."""

    @classmethod
    def from_pretrained(cls, name, local_files_only, trust_remote_code):
        assert trust_remote_code is False
        return "cache" if local_files_only else "hub"


@pytest.fixture
def hub(monkeypatch):
    """Session with the hub: its requests, which fail once `error` is set."""

    class Session:
        error = None
        urls: ClassVar[list[str]] = []

        def head(self, url, **options):
            self.urls.append(url)
            if self.error:
                raise self.error

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    return Session


@pytest.mark.parametrize(("error", "source"), [(None, "hub"), (OSError("no route"), "cache")])
def test_an_unreachable_hub_is_asked_once_and_the_cache_is_used(hub, error, source, monkeypatch):
    hub.error = error
    assert load_pretrained(HubModel, "a/model", "--caption_model") == source
    assert len(hub.urls) == 1

    # The weights of the face models are single files.
    def download(repository, file, local_files_only):
        return "cache" if local_files_only else "hub"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert faces.download_weights("a/model", "file.onnx") == source
    assert len(hub.urls) == 2


def test_a_path_is_never_sent_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in ("models/mine", tmp_path / "models" / "mine", tmp_path / "missing"):
        assert load_pretrained(HubModel, name, "--caption_model") == "cache"
    assert not hub.urls
