"""Telemetry of the libraries we are built on: off, in every process of ours, unless the environment says otherwise.

They read these variables when they are imported, so `stages` imports this module first of all. What is left is what a run
needs: models and data that the spec names come from the hub.
"""

from __future__ import annotations

import os

OFF = {
    "DO_NOT_TRACK": "1",  # huggingface_hub, vLLM and others
    "HF_HUB_DISABLE_TELEMETRY": "1",  # also what transformers, TRL and gradio send through huggingface_hub
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets tells which data set was opened
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers has a Space of the hub convert the weights it was asked for
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}

for _name, _value in OFF.items():
    os.environ.setdefault(_name, _value)
