"""Loading of pretrained vision models: what is here, without the hub, and one request else."""

from typing import ClassVar

import pytest

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.pretrained import load_pretrained


class UncachedModel:
    """Class of transformers whose model only the hub has."""

    loads: ClassVar[list[str]] = []

    @classmethod
    def from_pretrained(cls, name, local_files_only=False, **options):
        cls.loads.append("here" if local_files_only else "hub")
        if local_files_only:
            raise OSError("it is not cached")
        return cls()


@pytest.fixture
def hub_requests(monkeypatch):
    """Requests to the hub, which fail after `hub_requests.error` is set."""

    class Session:
        error = None
        urls: ClassVar[list[str]] = []

        def head(self, url, **options):
            self.urls.append(url)
            if self.error:
                raise self.error

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr(UncachedModel, "loads", [])
    return Session


def test_a_model_that_is_not_here_is_fetched_from_a_hub_that_answers(hub_requests):
    assert isinstance(load_pretrained(UncachedModel, "a/model", "--caption_model"), UncachedModel)
    assert UncachedModel.loads == ["here", "hub"]


def test_an_unreachable_hub_is_asked_once(hub_requests):
    hub_requests.error = OSError("no route")
    with pytest.raises(UserError, match="connect to the hub once"):
        load_pretrained(UncachedModel, "a/model", "--caption_model")
    assert UncachedModel.loads == ["here"] and len(hub_requests.urls) == 1


def test_a_broken_folder_is_not_asked_of_the_hub(hub_requests, tmp_path):
    with pytest.raises(UserError):
        load_pretrained(UncachedModel, tmp_path, "--caption_model")
    assert not hub_requests.urls
