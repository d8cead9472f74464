# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "minari[hdf5,hf]==0.5.4",
#     "gymnasium==1.4.0",
#     "gymnasium-robotics==1.4.2",
#     "mujoco==4.0.0",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
# ]
# ///
# Implicit Q-Learning (Kostrikov, Nair and Levine 2021, https://arxiv.org/abs/2110.06169), offline, in one file.
# Every update is the official implementation's: https://github.com/ikostrikov/implicit_q_learning
import copy
import csv
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Optional
from zipfile import BadZipFile, ZipFile

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import gymnasium_robotics
except (ImportError, AttributeError):  # MUJOCO_GL names a library that is not there: only videos need one
    os.environ["MUJOCO_GL"] = "disable"
    import gymnasium_robotics
import mujoco

gym.register_envs(gymnasium_robotics)


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, only deterministic algorithms are used: the same seed gives the same bits on the same machine"""
    cuda: bool = True
    """if toggled, cuda will be used where there is a GPU"""
    cudagraphs: bool = True
    """if toggled, a GPU runs the update as one CUDA graph; --no-cudagraphs if it cannot be captured"""
    compile: bool = False
    """if toggled, a GPU runs the update compiled by torch.compile, which takes a minute at the start"""
    tf32: bool = False
    """if toggled, a GPU may round the factors of matrix products to TF32"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "iql"
    """the wandb's project name"""
    wandb_entity: Optional[str] = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """whether to film one episode of the final policy (check out the `videos` folder)"""
    checkpoint: Optional[str] = None
    """a checkpoint.pt or best.pt to start from (with --total-updates 0 it is only evaluated, and needs no dataset)"""
    resume: Optional[str] = None
    """the directory of a run to go on with, under its own arguments but for those that are given anew"""

    # Algorithm specific arguments
    env_id: str = "AdroitHandHammer-v1"
    """the id of the environment"""
    dataset_id: Optional[str] = None
    """the id of the Minari dataset (default: the D4RL expert set of the Adroit task)"""
    max_episodes: Optional[int] = None
    """use only this many episodes, the dataset's first"""
    total_updates: int = 1_000_000
    """number of updates; a resumed run with a new number goes on on the new number's cosine"""
    batch_size: int = 256
    """the batch size of samples from the dataset"""
    learning_rate: float = 3e-4
    """the learning rate of all optimizers; the actor's falls to 0 on a cosine"""
    gamma: float = 0.99
    """the discount factor gamma"""
    tau: float = 0.005
    """target smoothing coefficient"""
    expectile: float = 0.7
    """the expectile of V's regression (tau in the paper): 0.5 is SARSA, near 1 the best action in the data"""
    beta: float = 3.0
    """inverse temperature of the actor's advantage weights: 0 is behaviour cloning"""
    max_weight: float = 100.0
    """upper limit of the advantage weights"""
    actor_dropout: float = 0.1
    """dropout rate of the actor's hidden layers"""
    normalize_obs: bool = True
    """if toggled, observations are standardized with the dataset's mean and deviation; a checkpoint keeps its own"""
    reward_scale: Optional[float] = None
    """factor on the rewards that are learned from (default: the checkpoint's, else 0.05 for Adroit, 1 elsewhere)"""
    eval_frequency: int = 5000
    """number of updates between two evaluations"""
    eval_episodes: int = 20
    """number of episodes of an evaluation"""
    final_episodes: int = 100
    """number of episodes of the last evaluation, which is the run's score"""
    eval_envs: int = min(10, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    """number of parallel evaluation environments, a process each"""

    def __post_init__(self):
        def require(holds, rule, *names):
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {rule}, not {value}.")

        require(lambda x: x >= 1, "at least 1", "batch_size", "max_episodes", "eval_frequency")
        require(lambda x: x >= 1, "at least 1", "eval_episodes", "final_episodes", "eval_envs")
        require(lambda x: 0 <= x < math.inf, "at least 0", "total_updates", "beta")
        require(lambda x: 0 < x < math.inf, "more than 0", "learning_rate", "max_weight", "reward_scale")
        require(lambda x: 0 < x < 1, "between 0 and 1", "expectile")
        require(lambda x: 0 <= x <= 1, "from 0 to 1", "gamma", "tau")
        require(lambda x: 0 <= x < 1, "at least 0 and below 1", "actor_dropout")
        require(lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1", "seed")


# D4RL's horizon and reference returns of a random policy and of the expert (d4rl/infos.py), by Adroit task
ADROIT = {
    "pen": (100, 96.262799, 3076.8331017826877),
    "hammer": (200, -274.856578, 12794.134825156867),
    "door": (200, -56.512833, 2880.5693087298737),
    "relocate": (200, -6.425911, 4233.877797728884),
}
# the evaluation episodes' reset seeds count from here: every run and every policy meets the same start states
EVAL_SEED = 1_000_000


def adroit_task(env_id):
    """The Adroit task that `env_id` stands for; None for other environments and for sparse rewards."""
    match = re.fullmatch(r"(.*:)?AdroitHand(Pen|Hammer|Door|Relocate)(Dense)?(-v\d+)?", env_id)
    return match and match[2].lower()


class D4RLRules(gym.Wrapper):
    """What D4RL (d4rl/hand_manipulation_suite) does otherwise than gymnasium-robotics' v1 tasks with dense rewards."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        task = adroit_task(self.spec.id)
        if task == "pen":
            terminated = terminated or bool(obs[26] < 0.075)  # a dropped pen ends the episode
        else:
            # D4RL takes 0.1 a meter between hand and object, gymnasium-robotics gives it
            reach = {"hammer": obs[33:36] - obs[36:39], "door": obs[35:38], "relocate": obs[30:33]}[task]
            reward -= 0.2 * np.linalg.norm(reach)
        return obs, reward, terminated, truncated, info


class ScaledActions(gym.ActionWrapper):
    """Takes actions (act_dim,) in [-1, 1] for a Box of any shape, bounds and dtype; rewards are floats."""

    def __init__(self, env):
        super().__init__(env)
        self.action_space = gym.spaces.Box(-1, 1, (math.prod(env.action_space.shape),), np.float32)

    def action(self, action):
        box = self.env.action_space
        low, high = box.low.astype(np.float64), box.high.astype(np.float64)
        action = low + (np.reshape(action, box.shape).astype(np.float64) + 1) / 2 * (high - low)
        if np.issubdtype(box.dtype, np.integer):
            action = np.rint(action)
        return np.asarray(np.clip(action, low, high), box.dtype)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, np.asarray(reward).item(), terminated, truncated, info  # some rewards are arrays of one number


def make_env(env_id, render_mode=None):
    """Thunk of an environment with observations (obs_dim,) and actions (act_dim,) in [-1, 1].

    An Adroit episode lasts as long as in D4RL and is rewarded as there, whatever is registered.
    """

    def thunk():
        task = adroit_task(env_id)
        kwargs = {"render_mode": render_mode} if render_mode else {}
        env = gym.make(env_id, max_episode_steps=ADROIT[task][0] if task else None, **kwargs)
        if task and env.spec.id.endswith("-v1"):
            env = D4RLRules(env)
        return ScaledActions(gym.wrappers.FlattenObservation(env))

    return thunk


def check_env(env_id):
    """The environment as it is registered. Exits with a sentence if it is unknown or nothing for this script."""
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        sys.exit(f"{env_id} cannot be made, change --env-id or install what it needs: {error}")
    if env.spec.max_episode_steps is None:
        sys.exit(f"{env_id} has no time limit: register it with max_episode_steps.")
    parts = env.observation_space.spaces.values() if isinstance(env.observation_space, gym.spaces.Dict) else []
    for space in parts or [env.observation_space]:
        if not isinstance(space, gym.spaces.Box):
            sys.exit(f"{env_id} has {space} in its observations: only a Box or a Dict of Boxes is supported.")
    if not isinstance(env.action_space, gym.spaces.Box):
        sys.exit(f"{env_id} has the action space {env.action_space}: only a Box is supported.")
    with np.errstate(over="ignore"):
        width = (env.action_space.high.astype(np.float64) - env.action_space.low).astype(np.float32).flatten()
    for i in np.flatnonzero(~((width > 0) & (width < np.inf))):
        sys.exit(f"{env_id} has a range of {width[i]} in dimension {i} of its actions: it must be finite and not 0.")
    return env


def make_eval_envs(env_id, num_envs):
    """Parallel environments, a process each.

    Call it before anything starts a thread or CUDA: on Linux the workers are forked, which is fast, and safe only then.
    Elsewhere they are spawned and import this file.
    """
    context = "fork" if sys.platform == "linux" else "spawn"
    return gym.vector.AsyncVectorEnv([make_env(env_id)] * num_envs, context=context)


def evaluate(envs, policy, episodes):
    """Run whole episodes, the k-th from reset seed EVAL_SEED + k.

    `policy` maps observations (num_envs, obs_dim) to actions (num_envs, act_dim). Returns the undiscounted episodic
    returns (episodes,) and whether `info["success"]` held at any step (episodes,), None if no episode says.
    """
    returns, successes, reports_success = np.zeros(0), np.zeros(0, dtype=bool), False
    while len(returns) < episodes:
        obs, _ = envs.reset(seed=[EVAL_SEED + len(returns) + i for i in range(envs.num_envs)])
        episodic_return, success = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=bool)
        running = np.ones(envs.num_envs, dtype=bool)  # what follows an episode's end, autoreset too, is ignored
        while running.any():
            obs, rewards, terminations, truncations, infos = envs.step(policy(obs))
            episodic_return += np.where(running, rewards, 0.0)
            if "success" in infos:
                reports_success = True
                success |= running & np.asarray(infos["success"], dtype=bool).reshape(envs.num_envs, -1).any(1)
            running &= ~(terminations | truncations)
        returns, successes = np.append(returns, episodic_return), np.append(successes, success)
    return returns[:episodes], successes[:episodes] if reports_success else None


def summarize(returns, successes, reference):
    """What is known of some episodes; normalized scores are 0 and 100 at the two `reference` returns."""
    summary = {"episodes": len(returns), "episodic_return": returns.mean().item()}
    summary["episodic_return_std"] = returns.std().item()
    if reference:
        random_return, expert_return = reference
        summary["normalized_score"] = 100 * (returns.mean().item() - random_return) / (expert_return - random_return)
    if successes is not None:
        summary["success_rate"] = successes.mean().item()
    return summary


def describe(summary):
    return ", ".join(f"{name}={round(value, 2)}" for name, value in summary.items())


def load_dataset(env_id, dataset_id=None):
    """Open a Minari dataset, downloading it if need be. Exits with a sentence if there is none.

    Without `dataset_id` it is D4RL's expert set of the Adroit task or, where that cannot be had, the small one that
    comes with this file in tests/datasets.
    """
    task = adroit_task(env_id)
    if dataset_id is None and task is None:
        sys.exit(f"{env_id} has no default dataset: name one with --dataset-id (`minari list remote` lists them).")
    wanted, bundled = dataset_id or f"D4RL/{task}/expert-v2", Path(__file__).resolve().parent / "tests" / "datasets"
    if not re.search(r"-v\d+$", wanted):
        sys.exit(f"{wanted} is not the id of a dataset, which ends in a version such as -v2.")
    path = bundled / wanted
    if not path.exists():
        try:
            path = minari.storage.get_dataset_path(wanted)
            if not path.exists():
                print(f"{wanted} is not in {path}: downloading it ...", flush=True)
                minari.download_dataset(wanted)
        except Exception as error:  # whatever the libraries between here and the server raise
            path, reason = bundled / f"bundled/{task}/demos-v0", f"could not be downloaded ({type(error).__name__})"
            if dataset_id is not None or not path.exists():
                sys.exit(f"{wanted} {reason}: check the network and the id, `minari list remote` lists all.")
            print(f"{wanted} {reason}. Using bundled/{task}/demos-v0: ITS SCORES ARE NOT D4RL SCORES.")
    try:
        metadata = json.loads((path / "data" / "metadata.json").read_text())
        if metadata["minari_version"] not in minari.supported_dataset_versions:
            sys.exit(
                f"{wanted} is of Minari {metadata['minari_version']}, which Minari {minari.__version__} cannot read."
            )
        # a KeyError where they are missing: Minari would make the environment named there, which may run foreign code
        metadata["observation_space"], metadata["action_space"]
        dataset = minari.MinariDataset(path / "data")
    except ImportError as error:
        sys.exit(f"{wanted} cannot be read without a package: {error}")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{wanted} cannot be opened, delete {path} and get it again: {type(error).__name__}: {error}")
    if dataset.env_spec and dataset.env_spec.id != env_id.split(":")[-1]:
        print(f"WARNING: {wanted} was recorded in {dataset.env_spec.id}, not in {env_id}.", file=sys.stderr)
    return dataset


def load_transitions(dataset, observation_space, action_space, horizon, max_episodes=None):
    """Read a Minari dataset into NumPy arrays; actions are scaled to [-1, 1].

    Returns (transitions, episodic_returns): a dict of `observations` (N, obs_dim) and `next_observations` (N, obs_dim),
    float64, `actions` (N, act_dim), `rewards` (N,) and `terminations` (N,), float32; and the returns of the episodes'
    first `horizon` steps (E,). Exits with a sentence if the dataset does not fit the spaces, is nearly empty, or holds
    NaN or infinity.
    """

    def shapes(space):
        return {k: v.shape for k, v in space.items()} if isinstance(space, gym.spaces.Dict) else space.shape

    for name, space in (("observation_space", observation_space), ("action_space", action_space)):
        found = getattr(dataset, name)
        if type(found) is not type(space) or shapes(found) != shapes(space):
            sys.exit(f"{dataset.id} is not for this environment: its {name} is {found}, the environment's {space}.")
    obs_dim, act_dim = gym.spaces.flatdim(observation_space), math.prod(action_space.shape)
    low, high = (bound.astype(np.float64).flatten() for bound in (action_space.low, action_space.high))
    total = min(dataset.total_episodes, max_episodes or dataset.total_episodes)
    steps, outside, episodic_returns = 0, 0, []
    try:
        rows = sum(metadata["total_steps"] for metadata in dataset.storage.get_episode_metadata(range(total)))
        transitions = {"observations": np.empty((rows, obs_dim)), "actions": np.empty((rows, act_dim), np.float32)}
        transitions |= {"rewards": np.empty(rows, np.float32), "next_observations": np.empty((rows, obs_dim))}
        transitions |= {"terminations": np.empty(rows, np.float32)}
        for episode in tqdm(dataset.iterate_episodes(range(total)), "reading", total, unit=" episodes", disable=None):
            T, observations = len(episode.rewards), episode.observations
            # Minari sorts the parts of a Dict, gymnasium flattens them in the environment's order
            parts = [observations[k] for k in observation_space] if isinstance(observations, dict) else [observations]
            if any(len(part) != T + 1 for part in parts):
                lengths = " and ".join(str(len(part)) for part in parts)
                sys.exit(f"{dataset.id} has {lengths} observations for the {T} steps of an episode, not {T + 1}.")
            observations = np.concatenate([part.reshape(T + 1, -1) for part in parts], 1)
            actions = (episode.actions.reshape(T, act_dim) - low) / (high - low) * 2 - 1
            outside += (np.abs(actions) > 1 + 1e-5).any(1).sum()
            now = slice(steps, steps + T)
            transitions["observations"][now] = observations[:-1]
            transitions["actions"][now] = np.clip(actions, -1 + 1e-5, 1 - 1e-5)  # as the official code does
            transitions["rewards"][now] = episode.rewards.reshape(T)
            transitions["next_observations"][now] = observations[1:]
            # a truncation is not the task's end: only a termination cuts the bootstrap
            transitions["terminations"][now] = episode.terminations.reshape(T)
            episodic_returns.append(transitions["rewards"][now][:horizon].sum(dtype=np.float64))
            steps += T
    except OSError as error:
        sys.exit(f"{dataset.id} cannot be read, delete it and get it again: {error}")
    if steps < 2:
        sys.exit(f"{dataset.id} has {steps} transitions: use a dataset with more, or a larger --max-episodes.")
    transitions = {name: column[:steps] for name, column in transitions.items()}
    for name, column in transitions.items():
        if not np.isfinite(column).all():
            sys.exit(f"{dataset.id} holds NaN or infinity in its {name}: use a dataset without.")
    if outside:
        share = f"{100 * outside / steps:.2g}% of the actions"
        print(
            f"WARNING: {share} of {dataset.id} lie outside the environment's bounds: they are clipped.", file=sys.stderr
        )
    return transitions, np.array(episodic_returns)


# ALGO LOGIC: initialize agent here
def layer_init(layer):
    nn.init.orthogonal_(layer.weight, math.sqrt(2))
    nn.init.zeros_(layer.bias)
    return layer


class Critic(nn.Module):
    """Q(s, a) or V(s): one number (batch,) for the concatenation of its inputs, each (batch, ...)."""

    def __init__(self, input_dim):
        super().__init__()
        self.fc1 = layer_init(nn.Linear(input_dim, 256))
        self.fc2 = layer_init(nn.Linear(256, 256))
        self.fc3 = layer_init(nn.Linear(256, 1))

    def forward(self, *inputs):
        x = F.relu(self.fc1(torch.cat(inputs, 1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x).squeeze(1)


LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class Actor(nn.Module):
    """Gaussian policy over actions in [-1, 1]: a tanh mean, a standard deviation that no state changes."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.fc1 = layer_init(nn.Linear(obs_dim, 256))
        self.fc2 = layer_init(nn.Linear(256, 256))
        self.fc_mean = layer_init(nn.Linear(256, act_dim))
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.register_buffer("obs_mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("obs_std", torch.ones(obs_dim, dtype=torch.float64))

    def forward(self, x, dropout=0.0):
        """Mean (batch, act_dim) and log standard deviation (act_dim,) at normalized observations (batch, obs_dim)."""
        x = F.dropout(F.relu(self.fc1(x)), dropout)
        x = F.dropout(F.relu(self.fc2(x)), dropout)
        return torch.tanh(self.fc_mean(x)), self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def log_prob(self, x, a, dropout=0.0):
        """log pi(a|x), (batch,)."""
        mean, log_std = self(x, dropout)
        return (-0.5 * ((a - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(1)

    def normalize(self, obs):
        """The environment's observations (batch, obs_dim), NumPy, as the networks take them: float32, standardized."""
        x = torch.as_tensor(obs, device=self.obs_mean.device, dtype=torch.float64)
        return (x - self.obs_mean).div_(self.obs_std).float()

    @torch.no_grad()
    def act(self, obs):
        """The mean policy, from the environment's observations (batch, obs_dim) to actions (batch, act_dim), NumPy."""
        return self(self.normalize(obs))[0].cpu().numpy()


class Agent(nn.Module):
    """All networks of IQL. The target critics start as copies of the critics."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim)
        self.vf = Critic(obs_dim)
        self.qf1 = Critic(obs_dim + act_dim)
        self.qf2 = Critic(obs_dim + act_dim)
        self.qf1_target = copy.deepcopy(self.qf1)
        self.qf2_target = copy.deepcopy(self.qf2)


def make_optimizers(agent, learning_rate):
    """Adam for V, for the actor and for the two critics; the rates are tensors, which a CUDA graph reads anew."""
    q_parameters = [*agent.qf1.parameters(), *agent.qf2.parameters()]
    groups = (agent.vf.parameters(), agent.actor.parameters(), q_parameters)
    device = agent.actor.log_std.device
    rates = [torch.tensor(learning_rate, device=device) for _ in groups]
    capturable = device.type == "cuda"
    return [optim.Adam(p, lr=lr, fused=True, capturable=capturable) for p, lr in zip(groups, rates, strict=True)]


def expectile_loss(u, expectile):
    """Mean of |expectile - 1(u < 0)| u^2 (Section 4.1): its minimizer is the expectile of what u is measured from."""
    return (torch.abs(expectile - (u < 0).float()) * u**2).mean()


def update(agent, optimizers, data, args):
    """One IQL update on a batch of transitions: V, then with the new V actor and critics, then the targets.

    Returns a dict of tensors on the device, losses () and values (batch,): nothing here waits for it.
    """
    v_optimizer, actor_optimizer, q_optimizer = optimizers
    obs, actions = data["observations"], data["actions"]

    # V(s) regresses to an expectile of min target-Q(s, a) over the data's actions (Eq. 5)
    with torch.no_grad():
        min_qf_target = torch.min(agent.qf1_target(obs, actions), agent.qf2_target(obs, actions))
    v_values = agent.vf(obs)
    v_loss = expectile_loss(min_qf_target - v_values, args.expectile)
    v_optimizer.zero_grad()
    v_loss.backward()
    v_optimizer.step()

    # the actor regresses to the data's actions, weighted by exp(beta * advantage) (Eq. 7)
    with torch.no_grad():
        advantages = min_qf_target - agent.vf(obs)
        weights = torch.exp(args.beta * advantages).clamp(max=args.max_weight)
    actor_loss = -(weights * agent.actor.log_prob(obs, actions, args.actor_dropout)).mean()
    actor_optimizer.zero_grad()
    actor_loss.backward()
    actor_optimizer.step()

    # Q(s, a) regresses to r + gamma V(s'): no action outside the data is ever evaluated (Eq. 6)
    with torch.no_grad():
        next_v_values = agent.vf(data["next_observations"])
        next_q_value = data["rewards"] + args.gamma * (1 - data["terminations"]) * next_v_values
    qf1_a_values = agent.qf1(obs, actions)
    qf2_a_values = agent.qf2(obs, actions)
    qf_loss = F.mse_loss(qf1_a_values, next_q_value) + F.mse_loss(qf2_a_values, next_q_value)
    q_optimizer.zero_grad()
    qf_loss.backward()
    q_optimizer.step()

    # the target critics follow by Polyak averaging
    with torch.no_grad():
        target_parameters = [*agent.qf1_target.parameters(), *agent.qf2_target.parameters()]
        torch._foreach_lerp_(target_parameters, q_optimizer.param_groups[0]["params"], args.tau)

    metrics = {"v_loss": v_loss, "actor_loss": actor_loss, "qf_loss": qf_loss, "qf_values": qf1_a_values}
    metrics |= {"v_values": v_values, "advantages": advantages, "weights": weights}
    return {name: tensor.detach() for name, tensor in metrics.items()}


def capture(step):
    """A function that does what `step()` does, on a GPU, as one CUDA graph: all its kernels are launched at once.

    Its first three calls are `step` itself: at a capture libraries must be loaded and optimizers have a state
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture). `step` may not look at values on the
    device, and takes what changes from tensors. From the fourth on, all calls return the same tensors.
    The current stream must not be the default one. Exits with a sentence if `step` cannot be captured.
    """
    graph, calls, result = torch.cuda.CUDAGraph(), 0, None

    def captured_step():
        nonlocal calls, result
        calls += 1
        if calls <= 3:
            return step()
        if calls == 4:
            try:
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):  # records and runs nothing
                    result = step()
            except RuntimeError as error:  # leaving a broken capture raises too: what broke it is the context
                sys.exit(f"The update cannot be captured, use --no-cudagraphs: {error.__context__ or error}")
        graph.replay()
        return result

    return captured_step


def save(state, path):
    """Write a checkpoint: whatever happens meanwhile, `path` is the old file or the complete new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path):
    """Read a checkpoint without executing anything in it. Exits with a sentence if it cannot be used."""
    try:
        with ZipFile(path) as archive:  # torch.load does not look at the checksums
            if archive.testzip():
                raise BadZipFile("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, BadZipFile, zlib.error, UnpicklingError) as error:
        sys.exit(f"{path} cannot be loaded ({type(error).__name__}): use a checkpoint.pt or best.pt of these scripts.")
    if not isinstance(saved, dict) or not {"args", "agent", "reference"} <= saved.keys():
        sys.exit(f"{path} is not a checkpoint of these scripts, or of an older version.")
    return saved


def make_video_env(env_id, folder, name):
    """An environment that films its first episode. Exits with a sentence if it cannot."""
    try:
        env = make_env(env_id, render_mode="rgb_array")()
        env.reset()
        env.render()
        return gym.wrappers.RecordVideo(env, folder, name_prefix=name)
    except gym.error.DependencyNotInstalled as error:
        sys.exit(f"--capture-video needs another package: {error}")
    except (AttributeError, ImportError, RuntimeError, mujoco.FatalError) as error:  # what graphics libraries raise
        sys.exit(f"{env_id} cannot be filmed, set MUJOCO_GL=egl or leave --capture-video out: {error}")


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for --env-id my_module:MyEnv-v0
    args = tyro.cli(Args)
    run_name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    run_dir, saved = Path("runs") / run_name, None
    if args.resume:
        run_dir = Path(args.resume)
        run_name, saved = run_dir.resolve().name, load(run_dir / "checkpoint.pt")
        if saved["args"].keys() != vars(args).keys():
            sys.exit(f"{run_dir} is not a run of this script or this version: resume it with the one that began it.")
        args = tyro.cli(Args, default=Args(**saved["args"]))
        for name in ("env_id", "dataset_id", "max_episodes", "seed", "normalize_obs", "reward_scale", "checkpoint"):
            if getattr(args, name) != saved["args"][name]:
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                sys.exit(f"{flag} would make another run of {run_dir}: leave it out, or begin a new run.")
        if args.total_updates != saved["args"]["total_updates"] and args.total_updates <= saved["global_step"]:
            sys.exit(f"--total-updates {args.total_updates} is not more than the {saved['global_step']} of {run_dir}.")
        if args.total_updates > 0 and not saved["measured"]:
            sys.exit(f"{run_dir} only evaluated {args.checkpoint}: begin a new run with that --checkpoint.")
    elif args.checkpoint:
        saved = load(args.checkpoint)
        if saved["args"]["env_id"] != args.env_id:
            sys.exit(f"{args.checkpoint} is of {saved['args']['env_id']}, not of {args.env_id}: change --env-id.")
    if args.track:
        try:
            import wandb
        except ImportError as error:
            sys.exit(f"--track needs wandb, `pip install wandb`: {error}")

    def stop(signum, frame):
        """Ctrl-C and SIGTERM end the run at once: it goes on from its last checkpoint."""
        if multiprocessing.parent_process() is None:  # forked workers have this handler too, and end silently
            for worker in multiprocessing.active_children():
                worker.kill()
            go_on = "start it again, there is no checkpoint yet"
            if (run_dir / "checkpoint.pt").exists():
                go_on = "go on with " + shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
            print(f"\nStopped: {go_on}", file=sys.stderr, flush=True)
        os._exit(128 + signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

    # env setup: the workers are forked before anything starts a thread
    env = check_env(args.env_id)
    envs = make_eval_envs(args.env_id, min(args.eval_envs, args.eval_episodes))
    obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    task = adroit_task(args.env_id)
    if args.capture_video:
        video_env = make_video_env(args.env_id, f"videos/{run_name}", f"{run_name}__{args.total_updates}")

    # TRY NOT TO MODIFY: seeding. All random numbers of the training are PyTorch's
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would write every new tensor twice
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.resume and saved["device"] != device.type:
        sys.exit(f"{run_dir} ran on {saved['device']}, not on {device.type}: resume it where its random numbers are.")
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # a CUDA graph cannot be captured on the default stream

    # data, and what is known of it and of a random policy before training
    agent = Agent(obs_dim, act_dim)
    reference = ADROIT[task][1:] if task else saved and saved["reference"]
    if saved:
        agent.load_state_dict(saved["agent"])
        args.normalize_obs = saved["args"]["normalize_obs"]  # the model has its own mean and deviation
    args.reward_scale = args.reward_scale or (saved["args"]["reward_scale"] if saved else 0.05 if task else 1.0)
    measured = saved["measured"] if args.resume else {}
    transitions, transition_count = {}, 0
    if args.total_updates > 0 or not saved:
        dataset = load_dataset(args.env_id, args.dataset_id)
        args.dataset_id = dataset.id
        horizon = ADROIT[task][0] if task else env.spec.max_episode_steps
        transitions, dataset_returns = load_transitions(
            dataset, env.observation_space, env.action_space, horizon, args.max_episodes
        )
        transition_count = len(transitions["rewards"])
        if args.resume and transition_count != (had := measured["dataset"]["transitions"]):
            sys.exit(f"{dataset.id} has {transition_count} transitions, {run_dir} began with {had}: begin a new run.")
        scores = [dataset.storage.metadata.get(name) for name in ("ref_min_score", "ref_max_score")]
        if not task and None not in scores:
            reference = tuple(map(float, scores))
        if args.normalize_obs and not saved:
            obs = transitions["observations"]
            std = np.where(np.ptp(obs, 0) > 0, obs.std(0) + 1e-3, 1.0)  # what never changes keeps its scale
            agent.actor.obs_mean.copy_(torch.from_numpy(obs.mean(0)))
            agent.actor.obs_std.copy_(torch.from_numpy(std))
        for name in ("observations", "next_observations"):
            transitions[name] = agent.actor.normalize(transitions[name])
        transitions["rewards"] *= args.reward_scale
        transitions = {name: torch.as_tensor(column).to(device) for name, column in transitions.items()}
        if not args.resume:
            rng, shape = np.random.default_rng(EVAL_SEED), (envs.num_envs, act_dim)
            random_returns, _ = evaluate(envs, lambda _: rng.uniform(-1, 1, shape), 20)
            measured["dataset"] = {"transitions": transition_count, **summarize(dataset_returns, None, reference)}
            measured["random"] = summarize(random_returns, None, reference)
    else:
        args.dataset_id = saved["args"]["dataset_id"]
    agent.to(device)
    optimizers = make_optimizers(agent, args.learning_rate)

    # where the run stands: evaluations are the rows of evaluations.csv
    first_step, evaluations, best_return, start_time = 0, [], -math.inf, time.time()
    if args.resume:
        first_step, evaluations, best_return = saved["global_step"] + 1, saved["evaluations"], saved["best_return"]
        start_time -= saved["wall_seconds"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            state["param_groups"][0]["lr"] = optimizer.param_groups[0]["lr"]  # stays this run's, on the device
            optimizer.load_state_dict(state)
        torch.set_rng_state(saved["rng_state"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng_state"])

    # logging
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    if args.resume:  # what was wished holds for the next --resume too
        save({**saved, "args": vars(args)}, run_dir / "checkpoint.pt")
    if args.track:
        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_name, "id": run_name}
        wandb.init(**names, resume="allow", sync_tensorboard=True, config=vars(args), save_code=True)
    (run_dir / "args.json").write_text(json.dumps({"args": vars(args), **measured}, indent=2))
    writer = SummaryWriter(run_dir, purge_step=first_step if args.resume else None)
    hyperparameters = "\n".join(f"|{key}|{value}|" for key, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{hyperparameters}")
    columns = "global_step episodes episodic_return episodic_return_std normalized_score success_rate wall_seconds"
    evaluations_file = open(run_dir / "evaluations.csv", "w", newline="", buffering=1)  # a row is written at once
    evaluations_table = csv.DictWriter(evaluations_file, columns.split())
    evaluations_table.writeheader()
    evaluations_table.writerows(evaluations)
    print(f"{run_dir}: {args.env_id} with {args.dataset_id} on {device}, from update {first_step}")
    for name, summary in measured.items():
        print(f"{name}: {describe(summary)}", flush=True)

    # one update on a batch that is drawn from the dataset: all of it happens on the device
    fast_update = torch.compile(update) if args.compile and device.type == "cuda" else update

    def step():
        indices = torch.randint(transition_count, (args.batch_size,), device=device)
        data = {name: tensor.index_select(0, indices) for name, tensor in transitions.items()}
        return fast_update(agent, optimizers, data, args)

    if args.cudagraphs and device.type == "cuda":
        step = capture(step)

    # TRY NOT TO MODIFY: start the training. global_step counts the updates done
    loop_start = time.time()
    steps = range(first_step, args.total_updates + 1)
    for global_step in tqdm(steps, initial=first_step, total=args.total_updates + 1, unit=" updates", disable=None):
        if global_step > 0:
            # the actor's learning rate falls on a cosine, as in the official code
            decay = 0.5 * (1 + math.cos(math.pi * (global_step - 1) / args.total_updates))
            optimizers[1].param_groups[0]["lr"].fill_(args.learning_rate * decay)
            metrics = step()

        last = global_step == args.total_updates
        evaluating = last or global_step % args.eval_frequency == 0
        if global_step > 0 and (evaluating or global_step % 500 == 0):
            # here, and nowhere else but in evaluations, the loop waits for the device
            metrics["clipped_weights"] = (metrics["weights"] >= args.max_weight).float()
            losses = {name: tensor.mean().item() for name, tensor in metrics.items()}
            if not all(map(math.isfinite, losses.values())):
                sys.exit(f"A loss is NaN or infinite at update {global_step}: lower --learning-rate or --reward-scale.")
            for name, value in losses.items():
                writer.add_scalar(f"losses/{name}", value, global_step)
            writer.add_scalar("charts/SPS", (global_step - first_step) / (time.time() - loop_start), global_step)

        if evaluating:
            episodes = args.final_episodes if last else args.eval_episodes
            returns, successes = evaluate(envs, agent.actor.act, episodes)
            summary = summarize(returns, successes, reference)
            row = {"global_step": global_step, **summary, "wall_seconds": time.time() - start_time}
            evaluations.append(row)
            evaluations_table.writerow(row)
            for name, value in summary.items():
                writer.add_scalar(f"charts/{name}", value, global_step)
            writer.flush()
            tqdm.write(describe(row))
            sys.stdout.flush()

            mean = returns[: args.eval_episodes].mean().item()  # on the start states that all evaluations share
            improved, best_return = mean > best_return, max(best_return, mean)
            state = {
                "args": vars(args),
                "device": device.type,
                "agent": agent.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "rng_state": torch.get_rng_state(),
                "cuda_rng_state": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                "global_step": global_step,
                "evaluations": evaluations,
                "best_return": best_return,
                "wall_seconds": time.time() - start_time,
                "reference": reference,
                "measured": measured,
            }
            if improved:
                save(state, run_dir / "best.pt")
            save(state, run_dir / "checkpoint.pt")

    if args.capture_video:
        obs, done = video_env.reset(seed=EVAL_SEED)[0], False
        while not done:
            obs, _, terminated, truncated, _ = video_env.step(agent.actor.act(obs[None])[0])
            done = terminated or truncated
        video_env.close()
        if args.track:
            film = f"videos/{run_name}/{run_name}__{args.total_updates}-episode-0.mp4"
            wandb.log({"video": wandb.Video(film)})
    envs.close()
    evaluations_file.close()
    writer.close()
    run = f"{args.env_id} with {args.dataset_id}, {args.total_updates} updates, seed {args.seed}"
    print(f"final: {run}: {describe(evaluations[-1])}")
