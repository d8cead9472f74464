# /// script
# requires-python = ">=3.11,<3.14"
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
"""Learns offline, then online, by IQL (arxiv.org/abs/2110.06169), as in github.com/ikostrikov/implicit_q_learning"""

import copy
import csv
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile, ZipFile

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(gymnasium_robotics)


@dataclass
class Args:
    env_id: str = "AdroitHandHammer-v1"
    """the id of the environment, or a checkpoint's; AdroitHandPenSparse-v1 is the papers' pen-binary"""
    dataset_id: str | None = None
    """the id of the Minari dataset; None: a checkpoint's, or D4RL's expert set of the Adroit task"""
    max_episodes: int | None = None
    """number of episodes to use, the dataset's first; None: a checkpoint's, if its dataset is used, or all"""
    offline_updates: int | None = None
    """number of updates on the dataset alone; None: 1,000,000, or 0 with --checkpoint, which takes their place"""
    online_steps: int = 1_000_000
    """number of environment steps after the offline updates, collected ones included; can be changed on resume"""
    seed: int = 1
    """seed of the experiment"""
    checkpoint: str | None = None
    """a checkpoint.pt or best.pt of either script to start from"""
    resume: str | None = None
    """the directory of a run to continue with its own arguments"""
    # Algorithm specific arguments
    learning_starts: int = 20_000
    """number of environment steps before the first online update"""
    exploration_scale: float = 0.3
    """factor on the policy's standard deviation when it collects"""
    batch_size: int = 256
    """the batch size of samples from all transitions"""
    learning_rate: float = 3e-4
    """the learning rate of all optimizers"""
    anneal_lr: bool = True
    """if toggled, the actor's learning rate decays to 0 on a cosine online; the official code keeps it constant"""
    gamma: float = 0.99
    """the discount factor gamma"""
    tau: float = 0.005
    """target smoothing coefficient"""
    expectile: float = 0.8
    """the expectile that V regresses to (tau in the paper): 0.5 is SARSA, near 1 the best action in the data"""
    beta: float = 3.0
    """inverse temperature of the actor's advantage weights: 0 is behavior cloning"""
    max_weight: float = 100.0
    """upper limit on the advantage weights"""
    actor_dropout: float = 0.1
    """dropout rate of the actor's hidden layers"""
    normalize_obs: bool = True
    """if toggled, observations are standardized by the dataset's mean and standard deviation, or as in a checkpoint"""
    reward_scale: float | None = None
    """factor on the rewards in training; None: a checkpoint's, or 0.005 for D4RL's Adroit tasks and 1 elsewhere"""
    reward_shift: float = 0.0
    """added to the rewards in training before scaling, e.g. -1 for AntMaze, or a checkpoint's"""
    # Evaluation and bookkeeping
    eval_frequency: int = 10_000
    """number of updates or environment steps between evaluations"""
    eval_episodes: int = 100
    """number of episodes per evaluation"""
    eval_envs: int = 10
    """number of parallel evaluation environments, each in its own process"""
    capture_video: bool = False
    """whether to film one episode of the final policy (check out the `videos` folder)"""
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "iql"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    cuda: bool = True
    """if toggled, cuda will be used if there is a GPU"""
    cudagraphs: bool = False
    """if toggled, the update is replayed as one CUDA graph on a GPU: what Python and the CPU choose in it is frozen"""
    torch_deterministic: bool = True
    """if toggled, only deterministic algorithms are used: the same seed gives the same bits on the same machine"""

    def __post_init__(self):
        if self.offline_updates is None:
            self.offline_updates = 0 if self.checkpoint else 1_000_000
        counts = (self.batch_size, self.eval_frequency, self.eval_episodes, self.eval_envs, self.max_episodes)
        if any(count is not None and count < 1 for count in counts):
            raise ValueError("batch size, evaluation frequency, episodes and environments must be at least 1")
        if not (0 < self.expectile < 1 and 0 <= self.gamma <= 1 and 0 <= self.tau <= 1 and 0 <= self.actor_dropout < 1):
            raise ValueError("--expectile, --gamma, --tau and --actor-dropout must lie between 0 and 1")
        nan = any(isinstance(value, float) and math.isnan(value) for value in vars(self).values())
        numbers = (self.offline_updates, self.online_steps, self.learning_starts, self.exploration_scale)
        if nan or not (self.learning_rate > 0 and min(*numbers, self.beta, self.max_weight) >= 0):
            raise ValueError("--learning-rate must be above 0, lengths and factors at least 0, and nothing NaN")
        if self.checkpoint and self.offline_updates and not self.resume:
            raise ValueError("--checkpoint takes the place of the offline updates: leave out --offline-updates")


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


class Actor(nn.Module):
    """Gaussian policy over actions in [-1, 1]: a tanh mean, a state-independent standard deviation."""

    def __init__(self, obs_dim, act_dim, dropout):
        super().__init__()
        self.fc1 = layer_init(nn.Linear(obs_dim, 256))
        self.fc2 = layer_init(nn.Linear(256, 256))
        self.fc_mean = layer_init(nn.Linear(256, act_dim))
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("obs_mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("obs_std", torch.ones(obs_dim, dtype=torch.float64))

    def forward(self, x):
        """Mean (batch, act_dim) and log standard deviation (act_dim,) at normalized observations (batch, obs_dim)."""
        x = self.dropout(F.relu(self.fc1(x)))
        x = self.dropout(F.relu(self.fc2(x)))
        return torch.tanh(self.fc_mean(x)), self.log_std.clamp(-5.0, 2.0)

    def log_prob(self, x, a):
        """log pi(a|x), (batch,)."""
        mean, log_std = self(x)
        return (-0.5 * ((a - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(1)

    def normalize(self, obs):
        """The environment's observations (..., obs_dim), NumPy, as the networks take them: float32, standardized."""
        x = torch.as_tensor(obs, device=self.obs_mean.device, dtype=torch.float64)
        return (x - self.obs_mean).div_(self.obs_std).float()

    @torch.no_grad()
    def act(self, obs):
        """The mean policy, from the environment's observations (batch, obs_dim) to actions (batch, act_dim), NumPy."""
        self.eval()  # update() goes back to train()
        return self(self.normalize(obs))[0].cpu().numpy()


class Agent(nn.Module):
    """All networks of IQL. The target critics start as copies of the critics."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.actor_dropout)
        self.vf = Critic(obs_dim)
        self.qf1 = Critic(obs_dim + act_dim)
        self.qf2 = Critic(obs_dim + act_dim)
        self.qf1_target = copy.deepcopy(self.qf1)
        self.qf2_target = copy.deepcopy(self.qf2)


def make_optimizers(agent, learning_rate):
    """Adam for V, for the actor and for the two critics; the rates are tensors, which a CUDA graph reads anew."""
    lr = torch.tensor(learning_rate, device=agent.actor.log_std.device)
    networks = (agent.vf, agent.actor, nn.ModuleList([agent.qf1, agent.qf2]))
    return [torch.optim.Adam(net.parameters(), lr.clone(), fused=True, capturable=lr.is_cuda) for net in networks]


def expectile_loss(u, expectile):
    """Mean of |expectile - 1(u < 0)| u^2 (Section 4.1). With u = target - V, the best V is the targets' expectile."""
    return (torch.abs(expectile - (u < 0).float()) * u**2).mean()


def update(agent, optimizers, data, args):
    """One IQL update on `data`, columns (batch, dim) or (batch,) by name. Returns losses () and values (batch,)."""
    v_optimizer, actor_optimizer, q_optimizer = optimizers
    agent.train()
    obs, actions = data["observations"], data["actions"]

    # V(s) regresses to an expectile of min target-Q(s, a) over the data's actions (Eq. 5)
    with torch.no_grad():
        min_qf_target = torch.min(agent.qf1_target(obs, actions), agent.qf2_target(obs, actions))
    v_values = agent.vf(obs)
    v_loss = expectile_loss(min_qf_target - v_values, args.expectile)
    v_optimizer.zero_grad()
    v_loss.backward()
    v_optimizer.step()

    # the actor regresses to the data's actions, weighted by exp(beta * advantage) with the new V (Eq. 7)
    with torch.no_grad():
        advantages = min_qf_target - agent.vf(obs)
        weights = torch.exp(args.beta * advantages).clamp(max=args.max_weight)
    actor_loss = -(weights * agent.actor.log_prob(obs, actions)).mean()
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

    # the target critics follow the critics by Polyak averaging
    with torch.no_grad():
        for qf, qf_target in ((agent.qf1, agent.qf1_target), (agent.qf2, agent.qf2_target)):
            for param, target_param in zip(qf.parameters(), qf_target.parameters(), strict=True):
                target_param.lerp_(param, args.tau)

    metrics = {"v_loss": v_loss, "actor_loss": actor_loss, "qf_loss": qf_loss, "qf_values": qf1_a_values}
    metrics |= {"v_values": v_values, "advantages": advantages, "weights": weights}
    return {name: tensor.detach() for name, tensor in metrics.items()}


@torch.no_grad()
def explore(actor, obs, scale):
    """Sample from the policy with `scale` times its standard deviation, from observations as in act()."""
    actor.eval()
    mean, log_std = actor(actor.normalize(obs))
    return (mean + scale * log_std.exp() * torch.randn_like(mean)).clamp(-1, 1).cpu().numpy()


# by Adroit task: D4RL's horizon, and its returns of a random policy and of the expert (d4rl/infos.py)
ADROIT = {
    "pen": (100, 96.262799, 3076.8331017826877),
    "hammer": (200, -274.856578, 12794.134825156867),
    "door": (200, -56.512833, 2880.5693087298737),
    "relocate": (200, -6.425911, 4233.877797728884),
}
# the papers' binary tasks, as pen-binary in AdroitHandPenSparse-v1: 0 in a step at the goal, else -1
ADROIT |= {f"{task}-binary": (horizon, -horizon, 0) for task, (horizon, _, _) in ADROIT.items()}
TASKS = {f"AdroitHand{task.capitalize()}-v1".replace("-binary", "Sparse"): task for task in ADROIT}
EVAL_SEED = 1_000_000  # the k-th episode of every evaluation is reset with EVAL_SEED + k: all have the same starts


class D4RLRules(gym.Wrapper):
    """Where D4RL (d4rl/hand_manipulation_suite) and the binary tasks (mj_envs) differ from gymnasium-robotics."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        task = TASKS[self.spec.id]
        if task.endswith("binary"):
            reward = float(info["success"]) - 1.0
        elif task == "pen":
            terminated = terminated or bool(obs[26] < 0.075)  # a dropped pen ends the episode
        else:
            reach = {"hammer": obs[33:36] - obs[36:39], "door": obs[35:38], "relocate": obs[30:33]}[task]
            reward -= 0.2 * np.linalg.norm(reach)  # gymnasium-robotics adds 0.1 * distance, D4RL subtracts it
        return obs, reward, terminated, truncated, info


def make_env(env_id, **kwargs):
    """A function that makes an environment with observations (obs_dim,) and actions (act_dim,) in [-1, 1]."""

    def thunk():
        env = gym.make(env_id, **kwargs)
        if env.spec.id in TASKS:
            env = D4RLRules(gym.wrappers.TimeLimit(env, ADROIT[TASKS[env.spec.id]][0]))
        box = env.action_space
        flat = isinstance(box, gym.spaces.Box) and len(box.shape) == 1 and box.dtype.kind == "f"
        if not (flat and box.is_bounded() and (box.low < box.high).all()):
            raise ValueError(f"{env_id} has actions in {box}: they need one dimension, floats and finite bounds")
        if not env.spec.max_episode_steps:
            raise ValueError(f"{env_id} has no time limit: register it with max_episode_steps")
        env = gym.wrappers.FlattenObservation(env)
        return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))

    return thunk


def evaluate(envs, policy, episodes):
    """Returns (episodes,) of `policy`, and whether each episode succeeded at any step, or None if none reports it."""
    returns, successes, reports_success = [], [], False
    while len(returns) < episodes:
        obs, _ = envs.reset(seed=EVAL_SEED + len(returns))
        episodic_return, success = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=bool)
        running = np.ones(envs.num_envs, dtype=bool)  # what follows an episode's end is ignored
        while running.any():
            obs, rewards, terminations, truncations, infos = envs.step(policy(obs))
            episodic_return += np.where(running, rewards, 0.0)
            reports_success |= "success" in infos
            success |= running & (np.asarray(infos.get("success", 0), dtype=float).ravel() > 0)  # None and NaN are not
            running &= ~(terminations | truncations)
        returns.extend(episodic_return)
        successes.extend(success)
    return np.array(returns[:episodes]), np.array(successes[:episodes]) if reports_success else None


def summarize(returns, successes, reference):
    """Statistics of episodes by name; a normalized score is 0 and 100 at the two `reference` returns, if there are."""
    mean, std = returns.mean().item(), returns.std().item()
    row = {"episodes": len(returns), "episodic_return": mean, "episodic_return_std": std}
    if reference:
        row["normalized_score"] = 100 * (mean - reference[0]) / (reference[1] - reference[0])
    if successes is not None:
        row["success_rate"] = successes.mean().item()
    return row


def describe(summary):
    return ", ".join(f"{name}={round(value, 2)}" for name, value in summary.items())


def load_dataset(env_id, dataset_id=None):
    """A Minari dataset, by default D4RL's expert set, or a bundled one if that cannot be had. Exits with a sentence."""
    task, bundled = TASKS.get(env_id), Path(__file__).resolve().parent / "tests" / "datasets"
    if dataset_id is None and (task is None or task.endswith("binary")):
        sys.exit(f"{env_id} has no default dataset: name one with --dataset-id (`minari list remote` lists them).")
    demos, wanted = f"bundled/{task}/demos-v0", f"D4RL/{task}/expert-v2" if dataset_id is None else dataset_id
    path = bundled / wanted if (bundled / wanted).exists() else minari.storage.get_dataset_path(wanted)
    if not path.exists():
        print(f"Downloading {wanted} (without a network this takes half a minute to fail)", flush=True)
        try:
            minari.download_dataset(wanted)
        except Exception as error:  # whatever the libraries between here and the server raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if dataset_id is not None or not (bundled / demos).exists():
                sys.exit(f"{wanted} cannot be downloaded ({reason}): check the network and the id.")
            print(f"{wanted} cannot be downloaded ({reason}). Using {demos}: ITS SCORES ARE NOT D4RL SCORES.")
            path = bundled / demos
    try:
        return minari.MinariDataset(path / "data")
    except (OSError, ValueError, KeyError, AssertionError) as error:
        sys.exit(f"{wanted} cannot be opened, or is not all at {path} yet: {type(error).__name__}: {error}")


def load_transitions(dataset, env, max_episodes=None):
    """Transitions, float64 arrays (N, ...) by name, and returns within the time limit (E,). Exits with a sentence."""
    task, origins = TASKS.get(env.spec.id, ""), []
    for spec in (dataset.env_spec or env.spec, env.spec):
        kwargs = json.dumps({**spec.kwargs, "render_mode": None}, sort_keys=True, default=str)
        wrappers = {w.name for w in spec.additional_wrappers} - {"D4RLRules", "FlattenObservation", "RescaleAction"}
        limit = "D4RL's" if spec.id in TASKS else spec.max_episode_steps
        origins.append(f"{spec.id}, kwargs {kwargs}, wrappers {sorted(wrappers)}, time limit {limit}")
    if origins[0] != origins[1]:
        print(f"WARNING: {dataset.id} was recorded in {origins[0]}, and not in {origins[1]}.", file=sys.stderr)
    space = dataset.observation_space
    parts = [dataset.action_space, *(space.values() if isinstance(space, gym.spaces.Dict) else [space])]
    if not all(isinstance(part, gym.spaces.Box) for part in parts):
        sys.exit(f"{dataset.id} is in {space} and {dataset.action_space}: only a Box or a Dict of them can be read.")
    names = ("observations", "actions", "rewards", "next_observations", "terminations")  # truncations cut no bootstrap
    columns, episodic_returns, indices = [], [], range(dataset.total_episodes)[:max_episodes]
    try:
        episodes = list(tqdm(dataset.iterate_episodes(indices), "reading", len(indices), disable=None))
    except (OSError, KeyError) as error:
        sys.exit(f"{dataset.id} cannot be read: {error}")
    for episode in episodes:
        T, obs, terminations = len(episode.rewards), episode.observations, episode.terminations
        if isinstance(obs, dict):  # in the environment's order, as FlattenObservation has it: Minari sorts the keys
            keys = [key for key in getattr(env.env.env.observation_space, "spaces", ()) if key in obs]
            obs = np.concatenate([obs[key].reshape(len(obs[key]), -1) for key in keys] or [np.zeros((1, 0))], 1)
        obs = obs.reshape(len(obs), -1)
        shapes = [obs.shape, episode.actions.shape, episode.rewards.shape, terminations.shape]
        fitting = [(T + 1, *env.observation_space.shape), (T, *env.action_space.shape), (T,), (T,)]
        if shapes != fitting:
            sys.exit(f"{dataset.id} does not fit {env.spec.id}: observations, ... have shapes {shapes}, not {fitting}.")
        if terminations[:-1].any() or episode.truncations[:-1].any():
            sys.exit(f"{dataset.id} has an episode that goes on after a termination or truncation: split it there.")
        if task == "pen" and (obs[:, 26] < 0.075).any():  # Minari's D4RL sets go on after a drop
            T = np.argmax(obs[:, 26] < 0.075)
            terminations = np.arange(T) == T - 1
        if task.endswith("binary") and not np.isin(episode.rewards, (0, -1)).all():
            sys.exit(f"{dataset.id} has other rewards than {env.spec.id}, which gives 0 at the goal and -1 elsewhere.")
        if T > 0:  # else it begins with the pen on the ground, where the episode before dropped it
            columns.append((obs[:T], episode.actions[:T], episode.rewards[:T], obs[1 : T + 1], terminations))
            episodic_returns.append(episode.rewards[:T][: env.spec.max_episode_steps].sum())
    if not columns:
        sys.exit(f"{dataset.id} holds no episode: use another dataset.")
    columns = [np.concatenate(column, dtype=np.float64) for column in zip(*columns, strict=True)]
    transitions = dict(zip(names, columns, strict=True))
    for name, column in transitions.items():
        if not np.isfinite(column).all():
            sys.exit(f"{dataset.id} holds NaN or infinity in its {name}: use a dataset without.")
    # actions are scaled by the bounds that they were recorded in, and clipped as in the official code
    low, high = np.float64(dataset.action_space.low), np.float64(dataset.action_space.high)
    if not (np.isfinite(high - low) & (high > low)).all():
        sys.exit(f"{dataset.id} has actions in {dataset.action_space}: use a dataset with finite bounds.")
    transitions["actions"] = np.clip((transitions["actions"] - low) / (high - low) * 2 - 1, -1 + 1e-5, 1 - 1e-5)
    return transitions, np.array(episodic_returns)


def capture(step):
    """Results of `step` as a CUDA graph: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture"""
    for _ in range(3):  # plain steps load the libraries and make Adam's state
        yield step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):  # records and runs nothing
        result = step()
    while True:
        graph.replay()
        yield result


def save(state, path):
    """Write a checkpoint: after a kill or a power cut, `path` is the old file or the complete new one."""
    with open(path.with_suffix(".tmp"), "wb") as file:  # torch.save by name hides a full disk
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def load(path):
    """Read a checkpoint without executing anything in it. Exits with a sentence if it cannot be used."""
    try:
        if ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise BadZipFile("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {**saved, "args": saved["args"]}  # a KeyError if another program wrote it
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, BadZipFile, UnpicklingError, zlib.error) as error:
        sys.exit(f"{path} is missing, damaged or not a checkpoint of these scripts ({type(error).__name__}: {error}).")


def parse_args():
    """The arguments, and the checkpoint that they start from or resume, or None. Exits with a sentence."""
    args = tyro.cli(Args, description=__doc__)
    if args.resume is None:
        if args.checkpoint is None:
            return args, None
        saved = load(args.checkpoint)
        names = ["env_id", "normalize_obs", "reward_scale", "reward_shift"]  # the checkpoint's, if not given
        names += ["dataset_id", "max_episodes"] if args.dataset_id is None else []
        inherited = {name: saved["args"][name] for name in names}
        args = tyro.cli(Args, default=Args(checkpoint=args.checkpoint, **inherited))
        names += ["gamma", "tau", "expectile", "beta", "max_weight", "actor_dropout", "batch_size"]
        changed = [name for name in names if vars(args).get(name) != saved["args"].get(name)]
        changed = [f"{name} {saved['args'].get(name)} -> {vars(args).get(name)}" for name in changed]
        print(f"{args.checkpoint} gives the networks. Other than in its run: {', '.join(changed) or 'nothing'}")
        return args, saved
    saved = load(f"{args.resume}/checkpoint.pt")
    if saved["args"].keys() != vars(args).keys() or "script" not in saved:
        sys.exit(f"{args.resume} is a run of another script or version: resume it with the one that began it.")
    args = tyro.cli(Args, default=Args(**saved["args"]))
    finished = args.offline_updates + args.online_steps <= saved["global_step"]
    free = ["online_steps", "dataset_id", "eval_frequency", "eval_envs", "capture_video"]
    free += ["track", "wandb_project_name", "wandb_entity"]
    changed = [name for name in vars(args) if name != "resume" and getattr(args, name) != saved["args"][name]]
    refused = [name for name in changed if finished or name not in free]  # free is what changes no update, and length
    if refused:
        sys.exit(f"{args.resume} takes no other {', '.join(refused)} at step {saved['global_step']}: begin a new run.")
    if finished:
        print(f"{args.resume} is finished: {describe(saved['evaluations'][-1])}")
        sys.exit()
    return args, saved


def stop(run_dir, signum, frame):
    """Ctrl-C and SIGTERM end this process and its workers at once. Raises nothing, which torch.save would reword."""
    if multiprocessing.parent_process() is None:  # forked workers get here too, and end silently
        for worker in multiprocessing.active_children():
            worker.kill()
        begun = (run_dir / "checkpoint.pt").exists()
        go_on = f"go on with python {sys.argv[0]} --resume {run_dir}" if begun else "start again, nothing is saved"
        os.write(2, f"\nStopped: {go_on}\n".encode())  # print may be what the signal interrupted
    os._exit(128 + signum)


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for --env-id my_module:MyEnv-v0
    args, saved = parse_args()
    if 0 < args.online_steps <= args.learning_starts:
        sys.exit("--online-steps must be more than --learning-starts, or 0.")
    total_steps = args.offline_updates + args.online_steps
    if args.track:
        import wandb

    # env setup
    env = make_env(args.env_id)()
    task = TASKS.get(env.spec.id)
    args.env_id = env.spec.id if task else args.env_id  # AdroitHandPen is another name of AdroitHandPen-v1
    new_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}_{os.urandom(2).hex()}"
    run_dir = Path(args.resume or "runs/" + re.sub(r"[^\w.-]", "_", new_name))
    run_name = run_dir.resolve().name
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *received: stop(run_dir, *received))
    envs = gym.vector.AsyncVectorEnv([make_env(args.env_id)] * args.eval_envs)  # forks, which is safe before threads
    if args.capture_video:
        video_env = gym.wrappers.RecordVideo(make_env(args.env_id, render_mode="rgb_array")(), f"videos/{run_name}")
        video_env.env.reset()
        video_env.env.render()  # fails before the training, if it does

    # TRY NOT TO MODIFY: seeding. All random numbers of the training are PyTorch's
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would write every new tensor twice
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # more gain little here, and lose much where other programs keep the cores busy
    args.cuda = args.cuda and torch.cuda.is_available()
    device = torch.device("cuda" if args.cuda else "cpu")
    if args.cuda:
        torch.cuda.set_stream(torch.cuda.Stream())  # a CUDA graph cannot be captured on the default stream

    # agent, from scratch or from a checkpoint
    agent = Agent(env.observation_space.shape[0], env.action_space.shape[0], args).to(device)
    if args.reward_scale is None:
        args.reward_scale = 1.0 if task is None or task.endswith("binary") else 0.005
    reference = ADROIT[task][1:] if task else None
    if saved:
        if saved["args"]["env_id"] != args.env_id:
            sys.exit(f"{args.resume or args.checkpoint} is of {saved['args']['env_id']}, not of {args.env_id}.")
        if saved["args"]["normalize_obs"] != args.normalize_obs:
            sys.exit(f"{args.checkpoint} has normalize_obs={not args.normalize_obs}: leave this flag out.")
        agent.load_state_dict(saved["agent"])
        reference = saved["reference"]

    # data, and the scores of what recorded them and of a random policy
    dataset = load_dataset(args.env_id, args.dataset_id)
    args.dataset_id = args.dataset_id or dataset.id
    transitions, dataset_returns = load_transitions(dataset, env, args.max_episodes)
    fingerprint = [zlib.crc32(column) for column in transitions.values()]
    low, high = map(dataset.storage.metadata.get, ("ref_min_score", "ref_max_score"))
    reference = reference if task or args.resume or None in (low, high) else (low, high)
    if args.normalize_obs and not saved:
        obs = transitions["observations"]
        std = np.where(np.ptp(obs, 0) > 0, obs.std(0) + 1e-3, 1.0)  # what never changes keeps its scale
        agent.actor.obs_mean.copy_(torch.from_numpy(obs.mean(0)))
        agent.actor.obs_std.copy_(torch.from_numpy(std))
    for name in ("observations", "next_observations"):
        transitions[name] = agent.actor.normalize(transitions[name])
    transitions = {name: torch.as_tensor(column).float() for name, column in transitions.items()}
    transitions["rewards"] = (transitions["rewards"] + args.reward_shift) * args.reward_scale
    transition_count = len(transitions["rewards"])
    for name, column in transitions.items():  # with room for the online ones
        transitions[name] = torch.cat([column, column.new_zeros(args.online_steps, *column.shape[1:])]).to(device)
    size = torch.tensor(transition_count, dtype=torch.float64, device=device)  # a CUDA graph reads it anew
    rng = np.random.default_rng(EVAL_SEED)
    random_returns, _ = evaluate(envs, lambda _: rng.uniform(-1, 1, envs.action_space.shape), 20)
    scores = {"dataset": {"transitions": transition_count, **summarize(dataset_returns, None, reference)}}
    scores["random"] = summarize(random_returns, None, reference)
    _, actor_optimizer, _ = optimizers = make_optimizers(agent, args.learning_rate)

    # where the run stands: evaluations are the rows of evaluations.csv
    first_step, evaluations, online_successes = 0, [], []
    best_return, start_time = -math.inf, time.monotonic()
    script = f"{zlib.crc32(Path(__file__).read_bytes()):08x}"
    if args.resume:
        if args.cuda != saved["args"]["cuda"]:
            sys.exit(f"{run_dir} ran on another device: resume it there.")
        if fingerprint != saved["fingerprint"]:
            sys.exit(f"The dataset {args.dataset_id} has changed since {run_dir} began: begin a new run.")
        if not saved["script"].endswith(script):
            print(f"{sys.argv[0]} has changed since {run_dir} began: the run goes on with the new text.")
            saved["script"] += f"+{script}"
        script = saved["script"]
        evaluations, online_successes = saved["evaluations"], saved["online_successes"]
        first_step, start_time = saved["global_step"] + 1, start_time - evaluations[-1]["wall_seconds"]
        if (run_dir / "best.pt").exists():  # after a kill it may be newer than the checkpoint
            best_return = load(run_dir / "best.pt")["evaluations"][-1]["episodic_return"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            state["param_groups"][0]["lr"] = optimizer.param_groups[0]["lr"]  # stays this run's, on the device
            optimizer.load_state_dict(state)
        torch.set_rng_state(saved["rng_state"])
        if args.cuda:
            torch.cuda.set_rng_state(saved["cuda_rng_state"])
        save({**saved, "args": vars(args)}, run_dir / "checkpoint.pt")  # what was given anew holds from now on
    origin = {"args": vars(args), "script": script, "reference": reference, "fingerprint": fingerprint}

    # the online transitions are in a file too, which outlives the process
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    dtype = np.dtype([(name, np.float32, column.shape[1:]) for name, column in transitions.items()])
    with open(run_dir / "online.bin", "ab") as file:
        file.write(bytes(max(0, dtype.itemsize * max(1, args.online_steps) - file.tell())))  # fails now on a full disk
    online = np.memmap(run_dir / "online.bin", dtype, "r+", shape=max(1, args.online_steps))
    collected = max(0, first_step - 1 - args.offline_updates)
    if (online[:collected] == np.zeros((), dtype)).any():  # such a row was never written
        sys.exit(f"{run_dir}/online.bin lacks transitions: begin a new run.")
    for name, column in transitions.items():
        column[transition_count : transition_count + collected] = torch.from_numpy(online[name][:collected])
    size += collected

    # logging
    if args.track:
        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_name, "id": run_name}
        wandb.init(**names, resume="allow", sync_tensorboard=True, config=vars(args), save_code=True)
    (run_dir / "tmp").write_text(json.dumps({"args": vars(args), "script": script} | scores, indent=2))
    os.replace(run_dir / "tmp", run_dir / "args.json")
    writer = SummaryWriter(run_dir, purge_step=first_step)
    writer.add_text("hyperparameters", "|param|value|\n|-|-|" + "".join(f"\n|{k}|{v}|" for k, v in vars(args).items()))
    print(f"{run_dir}: {args.env_id} with {args.dataset_id} on {device}, from step {first_step}")
    for name, summary in scores.items():
        print(f"{name}: {describe(summary)}", flush=True)

    # one update on a batch drawn from all transitions: all of it happens on the device
    def step():
        indices = (torch.rand(args.batch_size, dtype=torch.float64, device=device) * size).long()
        data = {name: tensor.index_select(0, indices) for name, tensor in transitions.items()}
        return update(agent, optimizers, data, args)

    if args.cudagraphs and args.cuda:
        step = capture(step).__next__  # plain three times, then recorded and replayed

    # TRY NOT TO MODIFY: start the training. global_step counts offline updates, then steps in the environment
    obs = None  # between two online episodes; a resumed run begins a new one
    for global_step in tqdm(range(first_step, total_steps + 1), disable=None):
        online_step = max(0, global_step - args.offline_updates)
        if online_step > 0:
            if obs is None:
                obs, _ = env.reset(seed=torch.randint(2**31, ()).item())
                episodic_return, success = 0.0, False
            action = explore(agent.actor, obs[None], args.exploration_scale)[0]
            next_obs, reward, terminated, truncated, info = env.step(action)
            if not (np.isfinite(next_obs).all() and np.isfinite(reward)):  # not stored, and not met again on resume
                save({**load(run_dir / "checkpoint.pt"), "rng_state": torch.get_rng_state()}, run_dir / "checkpoint.pt")
                sys.exit(f"{args.env_id} gave NaN or infinity at step {global_step}: go on with --resume {run_dir}")
            episodic_return += reward
            success |= bool(np.asarray(info.get("success", 0), dtype=float) > 0)
            # save the transition: a truncation is not the task's end
            x, next_x = agent.actor.normalize(np.stack([obs, next_obs])).cpu().numpy()
            online[online_step - 1] = (x, action, (reward + args.reward_shift) * args.reward_scale, next_x, terminated)
            for name, column in transitions.items():
                column[transition_count + online_step - 1] = torch.as_tensor(online[name][online_step - 1])
            size += 1
            obs = None if terminated or truncated else next_obs
            if obs is None:
                online_successes.append(success)
                writer.add_scalar("charts/online_episodic_return", episodic_return, global_step)

        # ALGO LOGIC: training
        learning = 0 < global_step <= args.offline_updates or online_step > args.learning_starts
        if learning:
            if args.anneal_lr and online_step > 0:
                decay = 0.5 * (1 + math.cos(math.pi * (online_step - 1) / args.online_steps))
                actor_optimizer.param_groups[0]["lr"].fill_(args.learning_rate * decay)
            metrics = step()

        # losses: while offline, the loop waits for the device only here and in evaluations
        evaluating = global_step % args.eval_frequency == 0 or global_step in (args.offline_updates, total_steps)
        if learning and (evaluating or global_step % 500 == 0):
            metrics["clipped_weights"] = (metrics["weights"] >= args.max_weight).float()
            for name, tensor in metrics.items():
                writer.add_scalar(f"losses/{name}", tensor.mean().item(), global_step)
            if not (metrics["v_loss"] + metrics["qf_loss"] + metrics["actor_loss"]).isfinite():
                sys.exit(f"A loss is NaN or infinite at step {global_step}: lower --learning-rate or --reward-scale.")
            writer.add_scalar("charts/SPS", global_step / (time.monotonic() - start_time), global_step)

        if evaluating:
            summary = summarize(*evaluate(envs, agent.actor.act, args.eval_episodes), reference)
            if "success_rate" in summary and online_successes:
                summary["regret"] = 1 - np.mean(online_successes).item()
            for name, value in summary.items():
                writer.add_scalar(f"charts/{name}", value, global_step)
            writer.flush()
            counts = {"global_step": global_step, "total_steps": total_steps, "online_steps": online_step}
            evaluations.append({**counts, **summary, "wall_seconds": time.monotonic() - start_time})
            tqdm.write(describe(evaluations[-1]))
            sys.stdout.flush()
            with open(run_dir / "evaluations.csv", "w", newline="") as file:
                table = csv.DictWriter(file, dict.fromkeys(name for row in evaluations for name in row))
                table.writeheader()
                table.writerows(evaluations)
            state = {
                **origin,
                "agent": agent.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "rng_state": torch.get_rng_state(),
                "cuda_rng_state": torch.cuda.get_rng_state() if args.cuda else None,
                "global_step": global_step,
                "evaluations": evaluations,
                "online_successes": online_successes,
            }
            online.flush()  # before a checkpoint counts on it
            if summary["episodic_return"] > best_return:
                best_return = summary["episodic_return"]
                save(state, run_dir / "best.pt")
            save(state, run_dir / "checkpoint.pt")

    if args.capture_video:
        evaluate(gym.vector.SyncVectorEnv([lambda: video_env]), agent.actor.act, episodes=1)
        video_env.close()
        if args.track:
            wandb.log({"video": wandb.Video(f"videos/{run_name}/rl-video-episode-0.mp4")})
    envs.close()
    writer.close()
    before = next(row for row in evaluations if row["global_step"] == args.offline_updates)
    print(f"before fine-tuning: {describe(before)}")
    print(f"final: {args.env_id} with {args.dataset_id}, seed {args.seed}: {describe(evaluations[-1])}")
