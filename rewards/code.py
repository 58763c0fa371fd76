"""The former name of `rewards.programs`, which recipes of one's own may still name."""

from rewards.programs import tests_reward as tests_reward
