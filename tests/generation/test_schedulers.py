"""The table of schedulers against diffusers' own classes."""

import pytest
from diffusers import EulerDiscreteScheduler

from dreambooth_moslora.generation.params import SCHEDULERS, make_scheduler, scheduler_of_title


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_has_its_class_its_options_and_the_noise_levels_of_the_base(name):
    made = make_scheduler(name, EulerDiscreteScheduler(beta_start=0.001, beta_end=0.02).config)
    assert type(made).__name__ == SCHEDULERS[name].class_name
    assert {key: made.config[key] for key in SCHEDULERS[name].options} == SCHEDULERS[name].options
    assert (made.config.beta_start, made.config.beta_end) == (0.001, 0.02)


def test_a_scheduler_is_found_by_the_name_of_other_programs():
    assert scheduler_of_title("DPM++ 2M Karras") == "dpmpp_2m_karras"
    assert scheduler_of_title("Euler a") is None
