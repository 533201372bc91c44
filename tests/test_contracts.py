"""What we rely on of the inside of other libraries: a new version that changes it fails here first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import trl.trainer.dpo_trainer as dpo
import trl.trainer.kto_trainer as kto

from stages.training.reference import references_elsewhere


@pytest.mark.parametrize(("module", "name"), [(dpo, "DPOTrainer"), (kto, "KTOTrainer")])
def test_trl_hashes_its_model_and_runs_its_reference_where_we_keep_it_from(module: Any, name: str) -> None:
    trainer = getattr(module, name)
    source = inspect.getsource(trainer.__init__)
    assert "hash_module(" in source and "self._precompute_ref_logps(" in source
    assert list(inspect.signature(trainer._precompute_ref_logps).parameters) == [
        "self",
        "dataset",
        "name",
        "batch_size",
    ]
    before = module.hash_module, trainer._precompute_ref_logps
    with references_elsewhere(module):
        assert module.hash_module(object()) == "" and trainer._precompute_ref_logps(None, "rows", "train", 1) == "rows"
    assert (module.hash_module, trainer._precompute_ref_logps) == before


def test_trl_keeps_no_reference_where_it_is_told_that_it_is_precomputed() -> None:
    for trainer in (dpo.DPOTrainer, kto.KTOTrainer):
        source = inspect.getsource(trainer.__init__)
        assert "args.precompute_ref_log_probs and not self.is_fsdp_enabled" in source


def test_the_trainer_asks_for_what_a_step_holds_before_its_first_micro_batch() -> None:
    """Fed counts a step's rows there, and KTO takes its KL."""
    from transformers import Trainer

    source = inspect.getsource(Trainer.get_batch_samples)
    assert "self._get_num_items_in_batch(batch_samples, device)" in source
