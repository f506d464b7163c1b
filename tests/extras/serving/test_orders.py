"""What a client sends becomes an order, or one line that says what was wrong."""

import json
import pickle

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.extras.serving.catalogue import AdapterRef, Order, RefusedError, parse_order


def order_of(**values) -> Order:
    return parse_order(json.dumps(values).encode())


def test_one_adapter_and_its_scale_are_a_short_form_of_the_list():
    short = order_of(prompt="a dog", adapter="rex", scale=0.5, seed=1)
    long = order_of(prompt="a dog", adapters=[["rex", 0.5]], seed=1)
    tag = order_of(prompt="a dog <lora:rex:0.5>", seed=1)
    assert short.params == long.params == tag.params
    assert order_of(prompt="a dog", adapter="rex", seed=1).params.adapters == (("rex", 1.0),)


def test_a_recipe_of_a_picture_is_an_order():
    params = order_of(prompt="a dog", adapter="rex", seed=7, steps=3).params
    again = order_of(**params.to_dict(), adapter_sha256={"rex": "ab"})
    assert again.params == params and again.sha256 == {"rex": "ab"}


def test_a_seed_that_is_left_out_is_drawn():
    assert len({order_of(prompt="a dog").params.seed for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"[" * 60_000, "JSON"),
        (b'{"prompt": "a", "seed": NaN}', "JSON"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "JSON"),
        (b'{"prompt": "\xff"}', "JSON"),
        (b'["a"]', "object"),
        (b"{}", "prompt"),
        (b'{"prompt": 3}', "prompt"),
        (b'{"prompt": "\\ud800"}', "character"),
        (b'{"prompt": "a", "steps": 101}', "100"),
        (b'{"prompt": "a", "steps": 1e400}', "steps"),
        (b'{"prompt": "a", "num_images": 2}', "one picture"),
        (b'{"prompt": "a", "scale": 2}', "adapter"),
        (b'{"prompt": "a", "adapter": "b", "adapters": [["c", 1]]}', "either"),
        (b'{"prompt": "a", "adapter": ["b"]}', "adapter"),
        (b'{"prompt": "a", "adapters": {"b": 1}}', "adapters"),
        (b'{"prompt": "a", "adapter_sha256": ["b"]}', "adapter_sha256"),
        (b'{"prompt": "a", "out": "/etc/passwd"}', "out"),
    ],
)
def test_a_mistake_is_one_line(body, word):
    with pytest.raises(UserError, match=word) as error:
        parse_order(body)
    assert "\n" not in str(error.value)


def test_orders_of_one_batch_have_adapters_scales_and_size_in_common():
    def key(sha: str = "1", **values) -> tuple:
        order = order_of(prompt="a", adapter="rex", **values)
        return Order(order.params, adapters=(AdapterRef("rex", "/rex", sha),)).batch_key

    assert key(seed=1, steps=2) == key(seed=2, steps=9)
    assert len({key(), key("2"), key(scale=0.5), key(height_px=64)}) == 4


def test_a_refusal_comes_whole_from_another_process():
    error = pickle.loads(pickle.dumps(RefusedError(503, "full", 4)))
    assert (error.status, str(error), error.retry_sec) == (503, "full", 4)
