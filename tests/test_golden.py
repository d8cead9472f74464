"""Twenty updates of each script against the official JAX implementation, on the same weights and batches.

`golden/official_iql_20_updates.npz` holds what the official code computed (float32, dropout off): `losses` (20, 6) are
value loss, critic loss, actor loss, mean V before its step, mean Q1 before its step and mean advantage after V's step;
`q1 q2 tq1 tq2 v mean log_std` are the outputs of the trained networks on a probe batch.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import iql_continuous
import iql_finetune

OBS_DIM, ACT_DIM, BATCH, UPDATES = 46, 26, 256, 20
GOLDEN = np.load(Path(__file__).parent / "golden" / "official_iql_20_updates.npz")
COLUMNS = ("v_loss", "qf_loss", "actor_loss", "v_values", "qf_values", "advantages")
SCRIPTS = [iql_continuous, iql_finetune]


def golden_agent(script, args):
    """The official run's starting weights, redrawn: its matrices are (in, out), torch's (out, in)."""
    rng, agent = np.random.RandomState(0), script.Agent(OBS_DIM, ACT_DIM, args)
    state = agent.state_dict()
    for name in ("qf1", "qf2", "vf", "actor"):
        sizes = [OBS_DIM + ACT_DIM * ("qf" in name), 256, 256, ACT_DIM if name == "actor" else 1]
        for k, layer in enumerate(("fc1", "fc2", "fc_mean" if name == "actor" else "fc3")):
            weight = (rng.standard_normal((sizes[k], sizes[k + 1])) / np.sqrt(sizes[k])).astype(np.float32)
            bias = (0.1 * rng.standard_normal(sizes[k + 1])).astype(np.float32)
            for network in (name, f"{name}_target") if "qf" in name else (name,):
                state[f"{network}.{layer}.weight"] = torch.tensor(weight.T)
                state[f"{network}.{layer}.bias"] = torch.tensor(bias)
    state["actor.log_std"] = torch.tensor((0.1 * rng.standard_normal(ACT_DIM) - 0.5).astype(np.float32))
    agent.load_state_dict(state)
    return agent


def golden_batches(count, size, seed):
    rng = np.random.RandomState(seed)
    for _ in range(count):
        batch = {
            "observations": rng.standard_normal((size, OBS_DIM)),
            "actions": rng.uniform(-1, 1, (size, ACT_DIM)),
            "rewards": rng.standard_normal(size),
            "terminations": rng.uniform(size=size) <= 0.1,
            "next_observations": rng.standard_normal((size, OBS_DIM)),
        }
        yield {name: torch.tensor(array.astype(np.float32)) for name, array in batch.items()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_twenty_updates_agree_with_the_official_implementation(script):
    args = script.Args(expectile=0.7, beta=0.5, gamma=0.99, tau=0.005, learning_rate=3e-4, actor_dropout=0.0)
    agent = golden_agent(script, args)
    optimizers = script.make_optimizers(agent, args.learning_rate)
    losses = []
    for k, batch in enumerate(golden_batches(UPDATES, BATCH, seed=1)):
        optimizers[1].param_groups[0]["lr"].fill_(args.learning_rate * 0.5 * (1 + np.cos(np.pi * k / 1000)))
        metrics = script.update(agent, optimizers, batch, args)
        losses.append([metrics[name].mean().item() for name in COLUMNS])
    np.testing.assert_allclose(losses, GOLDEN["losses"], rtol=1e-3, atol=1e-4)

    probe = next(golden_batches(1, 64, seed=99))
    obs, actions = probe["observations"], probe["actions"]
    agent.eval()
    with torch.no_grad():
        mean, log_std = agent.actor(obs)
        outputs = {"mean": mean, "log_std": log_std, "v": agent.vf(obs)}
        outputs |= {"q1": agent.qf1(obs, actions), "q2": agent.qf2(obs, actions)}
        outputs |= {"tq1": agent.qf1_target(obs, actions), "tq2": agent.qf2_target(obs, actions)}
    for name, output in outputs.items():
        np.testing.assert_allclose(output, GOLDEN[name], rtol=1e-3, atol=1e-4, err_msg=name)
