"""A fake engine: speaks as vLLM's server does where features come in, and runs the LLM of a stock model.

It tests the protocol: the wire format, prompt lengths, the mapping of errors. It is no vLLM: the test marked `vllm`
runs that one.
"""

import asyncio
import base64
import copy
import io
import json
import threading
from contextlib import contextmanager

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from serving_world import wait_for
from transformers.utils import ModelOutput

from prunetune.serving.run import listen


class FakeEngine:
    """Runs a stock model on the features of requests; ``seen`` are their bodies, ``fail`` is answered instead."""

    def __init__(self, model, processor, context=512):
        self.model = model
        self.processor = copy.deepcopy(processor)  # padding is set on it, by one thread at a time
        self.context = context
        self.seen = []
        self.fail = None
        self.miscounts = False
        self.lock = threading.Lock()

    def prompt(self, body):
        """Return ids (1, L) with as many placeholders as features, and the features (K, D) of each image."""
        features = []
        for message in body["messages"]:
            for part in message["content"]:
                if part["type"] == "image_embeds":
                    assert set(part) == {"type", "image_embeds"}
                    content = base64.b64decode(part["image_embeds"], validate=True)
                    features.append(torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False)))
                    assert features[-1].ndim == 2
                    part["type"] = "image"
        text = self.processor.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        pieces = text.split(self.processor.image_token)
        assert len(pieces) == len(features) + 1
        text = pieces[0]
        for own, piece in zip(features, pieces[1:], strict=True):
            text += self.processor.image_token * len(own) + piece
        ids = self.processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return ids, features

    def answer(self, ids, features, longest):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if features:
            image = ModelOutput(pooler_output=features)
            inputs["mm_encoder_outputs"] = {"image": image}
        with self.lock, torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        return tokens[0, ids.shape[1] :].tolist()

    def events(self, body):
        ids, features = self.prompt(body)
        tokens = self.answer(ids, features, body["max_tokens"])
        told = ""
        usage = {"prompt_tokens": ids.shape[1] + self.miscounts, "completion_tokens": 0}
        for count in range(1, len(tokens) + 1):
            text = self.processor.tokenizer.decode(tokens[:count], skip_special_tokens=True)
            ended = count == len(tokens)
            reason = ("stop" if tokens[-1] == self.processor.tokenizer.eos_token_id else "length") if ended else None
            choice = {"index": 0, "delta": {"content": text[len(told) :]}, "finish_reason": reason}
            told = text
            yield {"choices": [choice], "usage": usage | {"completion_tokens": count}}

    def app(self):
        app = FastAPI()

        @app.get("/v1/models")
        def models():
            return {"data": [{"id": "fake", "max_model_len": self.context}]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            body = json.loads(await request.body())
            self.seen.append(json.loads(await request.body()))
            if self.fail is not None:
                return JSONResponse({"error": {"message": self.fail[1]}}, self.fail[0])
            events = await asyncio.to_thread(lambda: list(self.events(body)))
            lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
            return StreamingResponse(iter(lines), media_type="text/event-stream")

        return app


@contextmanager
def fake_engine(model, processor, config):
    """Yield a fake engine and its address."""
    engine = FakeEngine(model, processor)
    listening = listen(config)
    server = uvicorn.Server(uvicorn.Config(engine.app(), log_level="warning"))
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    wait_for(server)
    try:
        yield engine, f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
