"""Serve a packed network over HTTP.

pip install 'nmflow[serve]' transformers
MODEL=bert-packed uvicorn serve:app --app-dir examples
curl localhost:8000/classify -H 'content-type: application/json' -d '{"texts": ["good", "bad"]}'
"""

import os
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

import nmflow  # noqa: F401  # pipeline reads packed folders once it is imported

loaded: dict[str, Any] = {}


class Texts(BaseModel):
    """The body of a request."""

    texts: list[str]


@asynccontextmanager
async def lifespan(app: FastAPI):
    """Load the network once, before the first request."""
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    loaded["classify"] = pipeline("text-classification", model=os.environ["MODEL"])
    yield
    loaded.clear()


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
def classify(body: Texts) -> list[dict[str, Any]]:
    """A label and a score for each text. A plain function: FastAPI runs it in a thread."""
    with torch.inference_mode():
        return loaded["classify"](body.texts)
