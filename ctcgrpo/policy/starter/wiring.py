"""How the starter's attention begins: able to take up a word that it was told.

A model this small finds that out by itself only after hours. So the first head of its first layer begins by looking one token
back, and the first head of the second by looking for what came after the last token like this one (an induction head);
whatever a head of the second layer looks at, it says. Everything else that writes to the residual stream begins small. All
of it is free to change as soon as teaching begins.
"""

from __future__ import annotations

import torch
from transformers import Qwen3ForCausalLM

_SMALL = 0.1
_WRITE, _SAY = 0.1, 0.3
_NEAR, _FAR = 0.03, 0.006
"""Radians a token: pairs that rotary positions turn faster than _NEAR tell neighbours apart; those slower than _FAR compare
what a token is, wherever it stands."""
_LOOK_BACK, _COMPARE = 2.5, 2.0


def wire(model: Qwen3ForCausalLM) -> None:
    """Set the initial weights in place; draws from torch's global generator. Needs at least two layers."""
    size, head = model.config.hidden_size, model.config.head_dim
    half = head // 2
    turn = model.config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    near, far = turn > _NEAR, turn < _FAR
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(_SMALL)
            layer.self_attn.o_proj.weight.mul_(_SMALL)
        # One dimension of every embedding is the same: what a head reads from it does not depend on the token.
        model.model.embed_tokens.weight[:, 0] = 1.0
        directions = torch.nn.init.orthogonal_(torch.empty(size - 1, size - 1))
        token, previous = directions[:head], directions[head : 2 * head]

        back = model.model.layers[0].self_attn
        for projection in (back.q_proj, back.k_proj, back.v_proj):
            projection.weight[:head] = 0
        back.q_proj.weight[:half, 0][near] = 1.0
        back.k_proj.weight[:half, 0][near] = torch.cos(turn[near])
        back.k_proj.weight[half:head, 0][near] = torch.sin(turn[near])
        back.q_norm.weight.fill_(_LOOK_BACK)
        back.k_norm.weight.fill_(_LOOK_BACK)
        back.v_proj.weight[:head, 1:] = token
        back.o_proj.weight[:, :head] = 0
        back.o_proj.weight[1:, :head] = _WRITE * previous.T

        match = model.model.layers[1].self_attn
        pairs = torch.nonzero(far).flatten()
        rows = torch.cat([pairs, pairs + half])
        for projection, read in ((match.q_proj, token), (match.k_proj, previous)):
            projection.weight[:head] = 0
            projection.weight[rows, 1:] = read[: len(rows)]
        match.q_norm.weight.fill_(_COMPARE)
        match.k_norm.weight.fill_(_COMPARE)
        torch.nn.init.orthogonal_(match.v_proj.weight)
        match.o_proj.weight.copy_(_SAY * match.v_proj.weight.T)
