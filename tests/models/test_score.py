"""Scores of given texts, as KerasHub's models have them."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from tests import helpers
from tests.helpers import jitted
from tests.models.test_generation import LENGTH, make_model, prompts


def test_score_is_the_logits_and_their_losses() -> None:
    model = make_model("hybrid")
    ids = prompts((LENGTH, LENGTH))["token_ids"]
    seen = []

    def intercept(x: Any, index: int) -> Any:
        seen.append(index)
        return x

    logits = jitted(partial(model.score, layer_intercept_fn=intercept))(ids)
    helpers.assert_close(np.array(logits), np.array(jitted(model)({"token_ids": ids})), 1e-5)
    assert seen == [-1, 0, 1, 2]
    losses = jitted(partial(model.score, scoring_mode="loss"))(ids[:, :-1], target_ids=ids[:, 1:])
    expected = jitted(model.token_losses)(ids[:, :-1], ids[:, 1:])
    helpers.assert_close(np.array(losses), np.array(expected), 1e-5)

    def double(x: Any, index: int) -> Any:
        return 2 * x if index == 0 else x

    doubled = jitted(partial(model.score, layer_intercept_fn=double))(ids)
    assert np.abs(np.array(doubled) - np.array(logits)).max() > 0.1
    with pytest.raises(ValueError, match="'rank'"):
        model.score(ids, scoring_mode="rank")
    with pytest.raises(ValueError, match="target_ids"):
        model.score(ids, scoring_mode="loss")
