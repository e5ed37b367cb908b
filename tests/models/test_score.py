"""Scores of given texts, as KerasHub's models have them."""

from typing import Any

import numpy as np
import pytest

from tests import helpers
from tests.models.test_generation import LENGTH, make_model, prompts


def test_score_is_the_logits_and_their_losses() -> None:
    model = make_model("hybrid")
    ids = prompts((LENGTH, LENGTH))["token_ids"]
    seen = []

    def intercept(x: Any, index: int) -> Any:
        seen.append(index)
        return x

    logits = model.score(ids, layer_intercept_fn=intercept)
    helpers.assert_close(
        np.array(logits), np.array(helpers.jitted(model)({"token_ids": ids})), 1e-5
    )
    assert seen == [-1, 0, 1, 2]
    losses = model.score(ids[:, :-1], scoring_mode="loss", target_ids=ids[:, 1:])
    expected = helpers.jitted(model.token_losses)(ids[:, :-1], ids[:, 1:])
    helpers.assert_close(np.array(losses), np.array(expected), 1e-5)
    doubled = model.score(ids, layer_intercept_fn=lambda x, index: 2 * x if index == 0 else x)
    assert np.abs(np.array(doubled) - np.array(logits)).max() > 0.1
    with pytest.raises(ValueError, match="'rank'"):
        model.score(ids, scoring_mode="rank")
    with pytest.raises(ValueError, match="target_ids"):
        model.score(ids, scoring_mode="loss")
