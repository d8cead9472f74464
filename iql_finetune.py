# Implicit Q-Learning (Kostrikov, Nair and Levine 2021, https://arxiv.org/abs/2110.06169), offline and then online.
# Every update is the official implementation's: https://github.com/ikostrikov/implicit_q_learning
import copy
import io
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from torch.autograd.function import once_differentiable
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

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
    compile: bool = True
    """if toggled, a GPU runs the update compiled by torch.compile"""
    cudagraphs: bool = True
    """if toggled, a GPU runs the update as one CUDA graph"""
    tf32: bool = False
    """if toggled, a GPU may round the factors of matrix products to TF32"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "iql"
    """the wandb's project name"""
    wandb_entity: Optional[str] = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """whether to record one episode of every evaluation (check out the `videos` folder)"""
    save_model: bool = False
    """whether to save the trained model as `model.pt` in the run directory"""
    checkpoint: Optional[str] = None
    """a model saved by either script to start from: skips the offline phase"""
    resume: Optional[str] = None
    """the directory of an interrupted run: go on with it, under its own arguments, whatever else is given"""

    # Algorithm specific arguments
    env_id: str = "AdroitHandHammer-v1"
    """the id of the environment"""
    dataset_id: Optional[str] = None
    """the id of the Minari dataset (default: the D4RL expert set of the Adroit task)"""
    max_episodes: Optional[int] = None
    """use only this many episodes, the dataset's first"""
    offline_updates: int = 1_000_000
    """number of updates on the dataset alone"""
    online_steps: int = 1_000_000
    """number of environment steps after that"""
    learning_starts: int = 20_000
    """how many of them come before the first online update; their updates are caught up on after that"""
    updates_per_step: int = 1
    """number of online updates for every environment step"""
    buffer_size: int = 2_000_000
    """transitions the replay buffer holds, the dataset's included"""
    num_envs: int = 1
    """number of parallel environments to collect with"""
    offline_fraction: Optional[float] = None
    """share of every online batch that is drawn from the dataset (default: uniform over the whole buffer)"""
    exploration_scale: float = 0.3
    """factor on the policy's standard deviation while it collects"""
    exploration_correlation: float = 0.0
    """how much of the noise of one step stays in the next: 0 is white noise"""
    batch_size: int = 256
    """the batch size of samples from the dataset"""
    learning_rate: float = 3e-4
    """the learning rate of all optimizers"""
    anneal_lr: bool = True
    """if toggled, the actor's falls on a cosine online; the official fine-tuning keeps it"""
    gamma: float = 0.99
    """the discount factor gamma"""
    tau: float = 0.005
    """target smoothing coefficient"""
    expectile: float = 0.8
    """the expectile of V's regression (tau in the paper): 0.5 is SARSA, near 1 the best action in the data"""
    beta: float = 3.0
    """inverse temperature of the actor's advantage weights: 0 is behaviour cloning"""
    max_weight: float = 100.0
    """upper limit of the advantage weights"""
    actor_dropout: float = 0.1
    """dropout rate of the actor's hidden layers"""
    normalize_obs: bool = True
    """if toggled, observations are standardized with the dataset's mean and standard deviation"""
    reward_scale: Optional[float] = None
    """factor on the rewards that are learned from (default: the checkpoint's, without one 0.005)"""
    eval_frequency: int = 5000
    """number of updates between two evaluations"""
    eval_episodes: int = 20
    """number of episodes of an evaluation"""
    eval_envs: int = min(10, os.cpu_count() or 1)
    """number of parallel evaluation environments, a process each"""
    concurrent_eval: Optional[bool] = None
    """whether training goes on during an evaluation (default: on a GPU only)"""


def check_args(args, names, rule, holds):
    """Exit with a sentence if one of the named arguments breaks a rule; None is no value."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not holds(value):
            sys.exit(f"--{name.replace('_', '-')} must be {rule}, not {value}.")


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
    match = re.fullmatch(r"AdroitHand(Pen|Hammer|Door|Relocate)(Dense)?-v\d+", env_id)
    return match and match[1].lower()


def make_env(env_id, idx=0, video_folder=None, video_every=1):
    """Thunk of an environment, as in CleanRL; an Adroit episode lasts as long as in D4RL, whatever is registered."""

    def thunk():
        horizon = ADROIT[adroit_task(env_id)][0] if adroit_task(env_id) else None
        if video_folder and idx == 0:
            env = gym.make(env_id, max_episode_steps=horizon, render_mode="rgb_array")
            return gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda e: e % video_every == 0)
        return gym.make(env_id, max_episode_steps=horizon)

    return thunk


def make_eval_envs(env_id, num_envs, video_folder=None, video_every=1):
    """Parallel environments, a process each. Exits with a sentence if `env_id` is unknown or its spaces are no Box.

    Call it before anything starts a thread or CUDA: on Linux the workers are forked, which is fast, and safe only then.
    Elsewhere, and for videos, since graphics libraries do not survive a fork, they are spawned and import this file.
    """
    try:
        env = make_env(env_id, 0, video_folder)()
        if video_folder:
            env.unwrapped.reset()
            env.unwrapped.render()
    except (gym.error.Error, ImportError) as error:
        sys.exit(f"{env_id} cannot be made, change --env-id or install what it needs: {error}")
    except Exception as error:  # graphics libraries raise anything
        if not video_folder:
            raise
        sys.exit(f"{env_id} cannot be filmed, set MUJOCO_GL=egl or leave --capture-video out: {error}")
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        if not isinstance(space, gym.spaces.Box):
            sys.exit(f"{env_id} has a {type(space).__name__} {name} space: only Box spaces are supported.")
    if not env.action_space.is_bounded():
        sys.exit(f"{env_id} has unbounded actions: only action spaces with finite bounds are supported.")
    env.close()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers leave Ctrl-C to the main process
    envs = gym.vector.AsyncVectorEnv(
        [make_env(env_id, i, video_folder, video_every) for i in range(num_envs)],
        context="fork" if sys.platform == "linux" and not video_folder else "spawn",
    )
    signal.signal(signal.SIGINT, interrupt)
    return envs


def evaluate(envs, policy, episodes):
    """Run whole episodes, the k-th from reset seed EVAL_SEED + k.

    `policy` maps observations (num_envs, ...) to actions (num_envs, ...). Returns the undiscounted episodic returns
    (episodes,) and whether `info["success"]` held at any step (episodes,), None if the environment never says.
    Exits with a sentence if a worker process dies.
    """
    returns, successes = np.zeros(0), np.zeros(0, dtype=bool)
    reports_success = False
    try:
        while len(returns) < episodes:
            obs, _ = envs.reset(seed=[EVAL_SEED + len(returns) + i for i in range(envs.num_envs)])
            episodic_return, success = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=bool)
            running = np.ones(envs.num_envs, dtype=bool)  # what follows an episode's end, autoreset too, is ignored
            while running.any():
                obs, rewards, terminations, truncations, infos = envs.step(policy(obs))
                episodic_return += np.where(running, rewards, 0.0)
                if "success" in infos:
                    reports_success = True
                    success |= running & np.asarray(infos["success"], dtype=bool)
                running &= ~(terminations | truncations)
            returns, successes = np.append(returns, episodic_return), np.append(successes, success)
    except (EOFError, ConnectionError) as error:
        time.sleep(1)  # the exit code comes a moment after the broken pipe
        codes = [process.exitcode for process in envs.processes if not process.is_alive()]
        sys.exit(
            f"An evaluation process died (exit codes {codes}, {type(error).__name__}): remove the cause and --resume."
        )
    return returns[:episodes], successes[:episodes] if reports_success else None


def summarize(env_id, returns, successes=None):
    """Mean return, D4RL's normalized score (0 is random, 100 the expert) and success rate: those that are known."""
    result = {"episodic_return": returns.mean().item()}
    if task := adroit_task(env_id):
        _, random_return, expert_return = ADROIT[task]
        result["normalized_score"] = 100 * (result["episodic_return"] - random_return) / (expert_return - random_return)
    if successes is not None:
        result["success_rate"] = successes.mean().item()
    return result


def find_dataset(env_id, dataset_id=None):
    """Open a Minari dataset, downloading it if need be. Exits with a sentence if there is none.

    Without `dataset_id` it is D4RL's expert set of the Adroit task or, where that cannot be had, the small one that
    comes with this file in tests/datasets.
    """
    task = adroit_task(env_id)
    if dataset_id is None and task is None:
        sys.exit(f"{env_id} has no default dataset: name one with --dataset-id (`minari list remote` lists them).")
    wanted, bundled_id = dataset_id or f"D4RL/{task}/expert-v2", f"bundled/{task}/demos-v0"
    local, bundled = minari.storage.get_dataset_path(), Path(__file__).parent / "tests" / "datasets"
    path = bundled / wanted if (bundled / wanted / "data").exists() else local / wanted
    if not (path / "data").exists():
        print(
            f"{path} does not exist: downloading {wanted} (without a network this gives up in half a minute) ...",
            flush=True,
        )
        try:
            minari.download_dataset(wanted)
        except Exception as error:  # whatever the libraries between here and the server raise
            sentence = f"{wanted} could not be downloaded ({type(error).__name__})"
            wanted, path = bundled_id, bundled / bundled_id
            if dataset_id is not None or not path.exists():
                sys.exit(f"{sentence}: check the network and the id, `minari list remote` lists all.")
            line = "!" * 80
            print(f"{line}\n{sentence}.\nUsing the small {bundled_id}: its scores are not D4RL scores.\n{line}")
    try:
        # without spaces in the metadata Minari would ask the environment that they name, and run whatever that is
        metadata = json.loads((path / "data" / "metadata.json").read_text())
        if not {"observation_space", "action_space"} <= metadata.keys():
            raise ValueError("metadata.json names no spaces")
        dataset = minari.MinariDataset(path / "data")
        if dataset.id != wanted:
            raise ValueError(f"it calls itself {dataset.id}")
        return dataset
    except Exception as error:  # a damaged file can raise anything
        sys.exit(f"{wanted} cannot be read, delete {path} and get it again: {type(error).__name__}: {error}")


def load_transitions(dataset, observation_space, action_space, max_episodes=None):
    """Read a Minari dataset into float32 CPU tensors; actions are scaled to [-1, 1].

    Returns (transitions, episodic_returns): a dict of `observations` (N, obs_dim), `actions` (N, act_dim), `rewards`
    (N,), `next_observations` (N, obs_dim) and `terminations` (N,), and the returns of the episodes (E,), NumPy.
    Exits with a sentence if the dataset does not fit the environment's spaces, is empty, or holds NaN or infinity.
    """
    for name, space in (("observation_space", observation_space), ("action_space", action_space)):
        found = getattr(dataset, name)
        if not isinstance(found, gym.spaces.Box) or found.shape != space.shape:
            sys.exit(f"{dataset.id} is not for this environment: its {name} is {found}, the environment's {space}.")
    obs_dim, act_dim = math.prod(observation_space.shape), math.prod(action_space.shape)
    total = min(dataset.total_episodes, max_episodes or dataset.total_episodes)
    steps, episodic_returns = 0, []
    try:
        shapes = {"observations": (obs_dim,), "actions": (act_dim,), "rewards": (), "next_observations": (obs_dim,)}
        shapes["terminations"] = ()
        columns = {name: np.empty((int(dataset.total_steps), *shape), np.float32) for name, shape in shapes.items()}
        for episode in tqdm(dataset.iterate_episodes(range(total)), "reading", total, unit=" episodes"):
            # T + 1 observations and T of everything else: next observations never cross an episode's end
            T = len(episode.rewards)
            rows, observations = slice(steps, steps + T), episode.observations.reshape(T + 1, obs_dim)
            columns["observations"][rows] = observations[:-1]
            columns["actions"][rows] = episode.actions.reshape(T, act_dim)
            columns["rewards"][rows] = episode.rewards
            columns["next_observations"][rows] = observations[1:]
            # a truncation is not the task's end: only a termination cuts the bootstrap
            columns["terminations"][rows] = episode.terminations.reshape(T)
            episodic_returns.append(columns["rewards"][rows].sum(dtype=np.float64))
            steps += T
    except Exception as error:  # a damaged file can raise anything
        sys.exit(f"{dataset.id} cannot be read, delete it and get it again: {type(error).__name__}: {error}")
    if steps == 0:
        sys.exit(f"{dataset.id} is empty: use a dataset with transitions.")
    transitions = {name: torch.from_numpy(column[:steps]) for name, column in columns.items()}
    for name, tensor in transitions.items():
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # both are NaN if anything is
            sys.exit(f"{dataset.id} holds NaN or infinity in its {name}: use a dataset without.")
    low, high = (
        torch.as_tensor(bound.flatten(), dtype=torch.float32) for bound in (action_space.low, action_space.high)
    )
    transitions["actions"].sub_((high + low) / 2).div_((high - low) / 2)
    transitions["actions"].clamp_(-1 + 1e-5, 1 - 1e-5)  # as the official code does
    return transitions, np.array(episodic_returns)


def layer_init(layer):
    nn.init.orthogonal_(layer.weight, math.sqrt(2))
    nn.init.zeros_(layer.bias)
    return layer


# oneDNN's x W^T + b has no public name; None where PyTorch was built without it
onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class OneDNNLinear(torch.autograd.Function):
    """`F.linear` of x (batch, inputs) by oneDNN: PyTorch asks MKL, which on AMD's CPUs takes twice as long."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = onednn_linear(grad, weight.t(), None, "none", [], "") if ctx.needs_input_grad[0] else None
        return grad_x, onednn_linear(grad.t(), x.t(), None, "none", [], ""), grad.sum(0)


class Linear(nn.Linear):
    """`nn.Linear` for hidden layers, faster on a CPU where the batch is large enough to tell."""

    def forward(self, x):
        if onednn_linear and x.is_cpu and len(x) >= 32 and not torch.compiler.is_compiling():
            return OneDNNLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


class Critic(nn.Module):
    """Q(s, a) or V(s): one number (batch,) for the concatenation of its inputs, each (batch, ...)."""

    def __init__(self, input_dim):
        super().__init__()
        self.fc1 = layer_init(Linear(input_dim, 256))
        self.fc2 = layer_init(Linear(256, 256))
        self.fc3 = layer_init(nn.Linear(256, 1))

    def forward(self, *inputs):
        x = F.relu(self.fc1(torch.cat(inputs, 1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x).squeeze(1)


def drop_out(x, rate):
    """`F.dropout` of a float tensor (batch, 256), the rate rounded down to 16 bits.

    It draws 16 random bits an element, four elements at once: F.dropout takes a tenth of a whole update on a CPU.
    """
    if rate == 0:
        return x
    threshold = int(rate * 2**16)
    bits = torch.empty(x.numel() // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None).view(torch.int16)
    return x * ((bits.view(x.shape) >= threshold - 2**15) * (1 / (1 - threshold / 2**16)))


LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class Actor(nn.Module):
    """Gaussian policy over actions scaled to [-1, 1]: a tanh mean, a standard deviation that no state changes."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.fc1 = layer_init(Linear(obs_dim, 256))
        self.fc2 = layer_init(Linear(256, 256))
        self.fc_mean = layer_init(nn.Linear(256, act_dim))
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        # observation statistics and action rescaling
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("action_scale", torch.ones(act_dim))
        self.register_buffer("action_bias", torch.zeros(act_dim))

    def forward(self, x, dropout=0.0):
        """Mean (batch, act_dim) and log standard deviation (act_dim,) at normalized observations (batch, obs_dim)."""
        x = drop_out(F.relu(self.fc1(x)), dropout)
        x = drop_out(F.relu(self.fc2(x)), dropout)
        return torch.tanh(self.fc_mean(x)), self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def log_prob(self, x, a, dropout=0.0):
        """log pi(a|x), (batch,)."""
        mean, log_std = self(x, dropout)
        return (-0.5 * ((a - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(1)

    def normalize(self, obs):
        """The environment's observations (batch, ...), NumPy, as the networks take them (batch, obs_dim)."""
        x = torch.as_tensor(obs, dtype=torch.float32, device=self.obs_mean.device).flatten(1)
        return (x - self.obs_mean) / self.obs_std

    @torch.no_grad()
    def act(self, obs):
        """The mean policy, from the environment's observations (batch, ...) to its actions (batch, act_dim), NumPy."""
        mean, _ = self(self.normalize(obs))
        return (mean * self.action_scale + self.action_bias).cpu().numpy()


class Agent(nn.Module):
    """All networks of IQL. The target critics start as copies of the critics."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.actor, self.vf = Actor(obs_dim, act_dim), Critic(obs_dim)
        self.qf1, self.qf2 = Critic(obs_dim + act_dim), Critic(obs_dim + act_dim)
        self.qf1_target, self.qf2_target = Critic(obs_dim + act_dim), Critic(obs_dim + act_dim)
        self.qf1_target.load_state_dict(self.qf1.state_dict())
        self.qf2_target.load_state_dict(self.qf2.state_dict())


def make_optimizers(agent, learning_rate):
    """Adam for V, for the actor and for the two critics; the rates are tensors, which a CUDA graph reads anew."""
    q_parameters = [*agent.qf1.parameters(), *agent.qf2.parameters()]
    groups = (agent.vf.parameters(), agent.actor.parameters(), q_parameters)
    device = agent.actor.log_std.device
    rates = [torch.tensor(learning_rate, device=device) for _ in groups]
    capturable = device.type == "cuda"
    return [optim.Adam(p, lr=lr, fused=True, capturable=capturable) for p, lr in zip(groups, rates, strict=True)]


def load_optimizers(optimizers, states):
    """Put the saved states into the optimizers; their learning rates stay the tensors that they are."""
    for optimizer, state in zip(optimizers, states, strict=True):
        state["param_groups"][0]["lr"] = optimizer.param_groups[0]["lr"]
        optimizer.load_state_dict(state)


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
    qf1_a_values, qf2_a_values = agent.qf1(obs, actions), agent.qf2(obs, actions)
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


def capture(step, generator):
    """A function that does what `step()` does, on a GPU, as one CUDA graph: all its kernels are launched at once.

    Its first calls are `step` itself, for a capture wants loaded libraries, compiled code and optimizers with a state
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture). `step` may not look at values on the
    device, takes what changes from tensors, and `generator` is the one that it draws from, besides torch's own.
    Later calls all return the same tensors. Exits with a sentence if `step` cannot be compiled or captured.
    """
    graph, stream, calls, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, None
    graph.register_generator_state(generator)

    def captured_step():
        nonlocal calls, result
        calls += 1
        try:
            if calls <= 3:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    result = step()
                torch.cuda.current_stream().wait_stream(stream)
                return result
            if calls == 4:
                with torch.cuda.graph(graph):  # records and runs nothing
                    result = step()
        except Exception as error:  # compilers and drivers raise anything
            sys.exit(f"The GPU refuses the update, try --no-compile or --no-cudagraphs: {error}")
        graph.replay()
        return result

    return captured_step


FILE_VERSION = 1


def save_file(state, path):
    """Write a model or checkpoint: whatever happens meanwhile, `path` is the old file or the complete new one."""
    buffer = io.BytesIO()
    torch.save({"version": FILE_VERSION, **state}, buffer)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_file(path):
    """Read a model or checkpoint without executing anything in it. Exits with a sentence if it cannot be used."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if archive.testzip():
                raise ValueError("its checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        version, _, _ = saved["version"], saved["agent"], saved["args"]["env_id"]
    except Exception as error:  # a damaged file can raise anything
        sys.exit(f"{path} cannot be loaded ({type(error).__name__}): use a file that this script saved.")
    if version != FILE_VERSION:
        sys.exit(f"{path} has format {version}, this script reads {FILE_VERSION}: use the script that wrote it.")
    return saved


def load_agent(agent, saved, env_id):
    """Put a loaded model into `agent`. Exits with a sentence if it is of another environment or other sizes."""
    if saved["args"]["env_id"] != env_id:
        sys.exit(f"The saved model was trained on {saved['args']['env_id']}, not on {env_id}: change --env-id.")
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError:
        sys.exit("The saved model has networks of other names or sizes: use one that this script saved for --env-id.")


def get_random_states(sampling_generator):
    """The states of all random number generators, in types that load without pickle."""
    name, keys, *position = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = {"python": random.getstate(), "numpy": (name, keys.tolist(), *position), "torch": torch.get_rng_state()}
    return {**states, "cuda": cuda, "sampling": sampling_generator.get_state()}


def set_random_states(states, sampling_generator):
    """Undo of `get_random_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])
    sampling_generator.set_state(states["sampling"])


def one_sentence(kind, error, traceback):
    """Excepthook: what the machine refuses (a full disk, a missing package or permission) needs no traceback."""
    if issubclass(kind, (OSError, ImportError, KeyboardInterrupt)):
        print(f"Stopped, start it or --resume it again without the cause: {kind.__name__} {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


class ReplayBuffer:
    """The dataset and behind it a ring of online transitions, on the device: the oldest of the ring is overwritten."""

    def __init__(self, transitions, buffer_size, device):
        self.offline_size = self.size = len(transitions["rewards"])
        self.size_on_device = torch.tensor(self.size, device=device)  # a CUDA graph reads it anew
        self.position = self.offline_size
        self.storage = {
            name: torch.empty(buffer_size, *tensor.shape[1:], device=device) for name, tensor in transitions.items()
        }
        for name, tensor in transitions.items():
            self.storage[name][: self.offline_size] = tensor

    def add(self, transitions):
        """Append a batch of transitions, a dict as from `load_transitions`."""
        count, capacity = len(transitions["rewards"]), len(self.storage["rewards"])
        ring = capacity - self.offline_size
        indices = self.offline_size + (self.position - self.offline_size + torch.arange(count)) % ring
        for name, tensor in self.storage.items():
            tensor[indices.to(tensor.device)] = transitions[name].to(tensor.device)
        self.position = self.offline_size + (self.position - self.offline_size + count) % ring
        self.size = min(self.size + count, capacity)
        self.size_on_device.fill_(self.size)

    def online(self):
        """What has been added, in the order in which it lies in the ring."""
        return {name: tensor[self.offline_size : self.size].clone() for name, tensor in self.storage.items()}

    def load_online(self, transitions, position):
        """Undo of `online`, for a buffer of the same size and dataset."""
        self.add(transitions)
        self.position = position

    def sample(self, batch_size, offline_fraction, generator):
        """A batch uniform over all transitions or, given a fraction, over the dataset for that share of it."""
        u = torch.rand(batch_size, generator=generator, device=generator.device, dtype=torch.float64)
        if offline_fraction is None or self.size == self.offline_size:
            indices = u * self.size_on_device
        else:
            count = round(offline_fraction * batch_size)
            online = self.offline_size + u[count:] * (self.size_on_device - self.offline_size)
            indices = torch.cat([u[:count] * self.offline_size, online])
        indices = indices.long()
        return {name: tensor.index_select(0, indices) for name, tensor in self.storage.items()}


@torch.no_grad()
def explore(actor, obs, noise, scale, correlation, generator):
    """Sample from the policy's Gaussian, clipped to the bounds, at normalized observations (batch, obs_dim).

    `noise` (batch, act_dim) is what this returned for the step before, None at the first: the noise of successive steps
    is an AR(1) process of variance 1, in discrete time what DDPG (Lillicrap et al. 2016, Section 3) explores with.
    Returns the noise, and actions in the networks' units and in the environment's (NumPy), all (batch, act_dim).
    """
    mean, log_std = actor(obs)
    white_noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    noise = white_noise if noise is None else correlation * noise + math.sqrt(1 - correlation**2) * white_noise
    actions = (mean + scale * log_std.exp() * noise).clamp(-1, 1)
    return noise, actions, (actions * actor.action_scale + actor.action_bias).cpu().numpy()


if __name__ == "__main__":
    sys.excepthook = one_sentence
    threading.excepthook = lambda _: None  # TensorBoard raises its thread's exceptions again in this one
    args = tyro.cli(Args)
    at_least_1 = "batch_size eval_frequency eval_episodes eval_envs max_episodes updates_per_step num_envs buffer_size"
    check_args(args, at_least_1, "at least 1", lambda x: x >= 1)
    at_least_0 = "offline_updates online_steps learning_starts beta exploration_scale"
    check_args(args, at_least_0, "at least 0", lambda x: 0 <= x < math.inf)
    check_args(args, "learning_rate max_weight reward_scale", "more than 0", lambda x: 0 < x < math.inf)
    check_args(args, "expectile", "between 0 and 1", lambda x: 0 < x < 1)
    check_args(args, "gamma tau offline_fraction", "from 0 to 1", lambda x: 0 <= x <= 1)
    check_args(args, "actor_dropout exploration_correlation", "at least 0 and below 1", lambda x: 0 <= x < 1)
    check_args(args, "seed", "from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)
    enough = f"0 or at least --learning-starts ({args.learning_starts})"
    check_args(args, "online_steps", enough, lambda x: x == 0 or x >= args.learning_starts)
    run_dir = Path(f"runs/{args.env_id.replace('/', '_')}__{args.exp_name}__{args.seed}__{int(time.time())}")
    saved = load_file(args.checkpoint) if args.checkpoint else None
    if args.resume:
        run_dir = Path(args.resume)
        saved = load_file(run_dir / "checkpoint.pt")
        if "optimizers" not in saved or saved["args"].keys() != vars(args).keys():
            sys.exit(f"{run_dir} is not a run of this script or this version: resume it with the one that began it.")
        args = Args(**{**saved["args"], "resume": args.resume})
    if args.reward_scale is None:
        args.reward_scale = saved["args"]["reward_scale"] if saved else 0.005
    if args.track:
        import wandb
    offline_updates = 0 if args.checkpoint else args.offline_updates
    total_updates = offline_updates + args.online_steps * args.updates_per_step

    # env setup: before anything starts a thread, see make_eval_envs
    num_eval_envs = min(args.eval_envs, args.eval_episodes)
    video_folder = f"videos/{run_dir.name}" if args.capture_video else None
    eval_envs = make_eval_envs(args.env_id, num_eval_envs, video_folder, math.ceil(args.eval_episodes / num_eval_envs))
    obs_space, action_space = eval_envs.single_observation_space, eval_envs.single_action_space
    # what a step returns where an episode ended is the next one's first observation; the last one is in infos
    envs = gym.vector.SyncVectorEnv([make_env(args.env_id)] * args.num_envs, autoreset_mode="SameStep")

    # seeding: torch's own generator initializes the networks and then belongs to dropout
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would write every new tensor twice
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    sampling_generator = torch.Generator(device).manual_seed(args.seed)
    exploration_generator = torch.Generator(device).manual_seed(args.seed)

    # agent and data
    agent = Agent(math.prod(obs_space.shape), math.prod(action_space.shape))
    agent.actor.action_scale.copy_(torch.as_tensor((action_space.high - action_space.low).flatten() / 2))
    agent.actor.action_bias.copy_(torch.as_tensor((action_space.high + action_space.low).flatten() / 2))
    if saved:
        load_agent(agent, saved, args.env_id)
    if args.checkpoint and saved["args"]["reward_scale"] != args.reward_scale:
        sys.exit(f"The saved model needs --reward-scale {saved['args']['reward_scale']}, as in its training.")
    dataset = find_dataset(args.env_id, args.dataset_id)
    args.dataset_id = dataset.id
    transitions, dataset_returns = load_transitions(dataset, obs_space, action_space, args.max_episodes)
    if args.buffer_size < len(transitions["rewards"]) + args.num_envs:
        sys.exit(
            f"--buffer-size {args.buffer_size} is too small for the dataset's {len(transitions['rewards'])} and more."
        )
    if args.normalize_obs and not saved:
        agent.actor.obs_mean.copy_(transitions["observations"].mean(0))
        agent.actor.obs_std.copy_(transitions["observations"].std(0) + 1e-3)
    for name in ("observations", "next_observations"):
        transitions[name].sub_(agent.actor.obs_mean).div_(agent.actor.obs_std)
    transitions["rewards"].mul_(args.reward_scale)
    rb = ReplayBuffer(transitions, args.buffer_size, device)
    returns_before = {}
    if not args.resume:
        rng, shape = np.random.default_rng(EVAL_SEED), (num_eval_envs, *action_space.shape)
        random_returns, _ = evaluate(eval_envs, lambda _: rng.uniform(action_space.low, action_space.high, shape), 20)
        returns_before = {"dataset": dataset_returns, "random": random_returns}
    agent.to(device)
    optimizers = make_optimizers(agent, args.learning_rate)

    # where the run stands: scalars go to TensorBoard next, evaluations are the rows of evaluations.csv
    first_step, scalars, evaluations, summaries, start_time = 0, {}, [], {}, time.time()
    online_steps, online_successes = 0, []  # environment steps done, and whether each online episode was a success
    if args.resume:
        if saved["device"] != device.type:
            sys.exit(
                f"{run_dir} ran on {saved['device']}, this is {device.type}: resume it where its random numbers are."
            )
        first_step, scalars, evaluations = saved["global_step"], saved["scalars"], saved["evaluations"]
        start_time -= saved["wall_seconds"]
        online_steps, online_successes, summaries = saved["online_steps"], saved["online_successes"], saved["summaries"]
        load_optimizers(optimizers, saved["optimizers"])
        rb.load_online(saved["online"], saved["position"])
        set_random_states(saved["random_states"], sampling_generator)
        exploration_generator.set_state(saved["exploration"])

    # logging
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    if args.track:
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            sync_tensorboard=True,
            config=vars(args),
            name=run_dir.name,
            monitor_gym=True,
            save_code=True,
        )
    writer = SummaryWriter(run_dir, purge_step=first_step if args.resume else None)
    writer.add_text(
        "hyperparameters",
        "|param|value|\n|-|-|\n%s" % ("\n".join([f"|{key}|{value}|" for key, value in vars(args).items()])),
    )
    evaluations_file = open(run_dir / "evaluations.csv", "w")
    columns = "global_step,episodic_return_mean,episodic_return_std,normalized_score,success_rate,wall_seconds,phase"
    evaluations_file.writelines(f"{row}\n" for row in [columns, *evaluations])
    print(f"{run_dir}: {args.env_id} with {args.dataset_id} on {device}, from update {first_step}")
    for name, returns in returns_before.items():
        summary = ", ".join(f"{key}={value:.2f}" for key, value in summarize(args.env_id, returns).items())
        print(f"{name}: {summary} (std {returns.std():.2f}, {len(returns)} episodes)")
        scalars[f"charts/{name}_return"] = returns.mean().item()

    # SIGINT and SIGTERM end the run after the update, with a checkpoint; a second one ends it at once
    stop_signals = []

    def request_stop(signum, frame):
        if stop_signals:
            for process in eval_envs.processes:
                process.kill()
            os._exit(128 + signum)
        stop_signals.append(signum)

    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)

    # one update on a batch that is drawn from the buffer: all of it happens on the device
    fast_update = torch.compile(update) if args.compile and device.type == "cuda" else update

    def step():
        data = rb.sample(args.batch_size, args.offline_fraction, sampling_generator)
        return fast_update(agent, optimizers, data, args)

    offline_step = online_step = step
    if args.cudagraphs and device.type == "cuda":  # two graphs: the batches are not drawn alike
        offline_step, online_step = capture(step, sampling_generator), capture(step, sampling_generator)

    # an evaluation has a thread and a copy of the actor; on a GPU training goes on meanwhile, for the cores are free
    evaluator, evaluation, evaluated_step = ThreadPoolExecutor(1), None, None
    concurrent_eval = device.type == "cuda" if args.concurrent_eval is None else args.concurrent_eval

    def record(step, returns, successes):
        result = summarize(args.env_id, returns, successes)
        for name, value in result.items():
            writer.add_scalar(f"charts/{name}", value, step)
        row = [step, returns.mean(), returns.std()]
        row += [result.get("normalized_score", ""), result.get("success_rate", ""), time.time() - start_time]
        row += ["offline" if step <= offline_updates else "online"]
        evaluations.append(",".join(map(str, row)))
        evaluations_file.write(evaluations[-1] + "\n")
        evaluations_file.flush()
        summaries[step] = ", ".join(f"{name}={value:.2f}" for name, value in result.items())
        bar.set_postfix_str(summaries[step])
        tqdm.write(f"global_step={step}, {summaries[step]}")

    # training: global_step counts the updates done, offline and online
    obs = None  # no online episode is under way yet; one that was when a run stopped is not restored
    loop_start = time.time()
    bar = tqdm(total=total_updates, initial=first_step, unit=" updates")
    for global_step in range(first_step, total_updates + 1):
        if global_step > first_step:
            scalars = {}
            online_updates = global_step - offline_updates  # this one included; not above 0 while offline
            # the first online updates would repeat the few online transitions that there are: collect some before
            steps_due = max(args.learning_starts, math.ceil(online_updates / args.updates_per_step))
            if online_updates > 0 and online_steps < args.learning_starts:
                tqdm.write(f"collecting {args.learning_starts - online_steps} steps before the online updates")
            while online_updates > 0 and online_steps < steps_due and not stop_signals:
                online_steps += args.num_envs
                if obs is None:
                    obs = agent.actor.normalize(envs.reset(seed=args.seed + global_step)[0])
                    episodic_return, success = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=bool)
                    noise = None
                scale, correlation = args.exploration_scale, args.exploration_correlation
                noise, actions, env_actions = explore(
                    agent.actor, obs, noise, scale, correlation, exploration_generator
                )
                next_obs, rewards, terminations, truncations, infos = envs.step(
                    env_actions.reshape(envs.action_space.shape)
                )
                done, final_info = terminations | truncations, infos.get("final_info", {})
                real_next_obs = next_obs.copy()
                for idx in np.flatnonzero(done):
                    real_next_obs[idx] = infos["final_obs"][idx]
                rb.add(
                    {
                        "observations": obs,
                        "actions": actions,
                        "rewards": torch.as_tensor(rewards * args.reward_scale, dtype=torch.float32),
                        "next_observations": agent.actor.normalize(real_next_obs),
                        "terminations": torch.as_tensor(terminations, dtype=torch.float32),
                    }
                )
                obs = agent.actor.normalize(next_obs)
                episodic_return += rewards
                for info in (infos, final_info):
                    success |= np.asarray(info.get("success", False), dtype=bool)
                if done.any():
                    scalars["charts/online_episodic_return"] = episodic_return[done].mean().item()
                if "success" in final_info:
                    online_successes += success[done].tolist()
                    scalars["charts/regret"] = 1 - np.mean(online_successes).item()
                episodic_return[done], success[done] = 0.0, False
            if args.anneal_lr and online_updates > 0:
                # without it the policy at an evaluation is one of many that succeed between half the time and always
                decay = 0.5 * (1 + math.cos(math.pi * (online_updates - 1) / (total_updates - offline_updates)))
                optimizers[1].param_groups[0]["lr"].fill_(args.learning_rate * decay)
            metrics = online_step() if online_updates > 0 else offline_step()
            bar.update()

        stopping = len(stop_signals) > 0 and global_step < total_updates
        evaluating = global_step % args.eval_frequency == 0 or global_step in (offline_updates, total_updates)
        logging = evaluating or global_step % 500 == 0
        if global_step > first_step and (logging or stopping):
            # here, and nowhere else but in evaluations, the loop waits for the device
            metrics["clipped_weights"] = (metrics["weights"] >= args.max_weight).float()
            losses = {f"losses/{name}": tensor.mean().item() for name, tensor in metrics.items()}
            if not all(map(math.isfinite, losses.values())):
                sys.exit(f"A loss is NaN or infinite at update {global_step}: lower --learning-rate or --reward-scale.")
            if logging:
                scalars |= {**losses, "charts/SPS": (global_step - first_step) / (time.time() - loop_start)}
        if evaluation and (stopping or evaluating or evaluation.done()):
            record(evaluated_step, *evaluation.result())
            evaluation = None
        if stopping or evaluating:
            writer.flush()
            state = {
                "args": vars(args),
                "device": device.type,
                "agent": agent.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "online": rb.online(),
                "position": rb.position,
                "exploration": exploration_generator.get_state(),
                "online_steps": online_steps,
                "online_successes": online_successes,
                "summaries": summaries,
                "random_states": get_random_states(sampling_generator),
                "global_step": global_step,
                "scalars": scalars,
                "evaluations": evaluations,
                "wall_seconds": time.time() - start_time,
            }
            save_file(state, run_dir / "checkpoint.pt")
        if stopping:
            bar.close()
            print(f"Stopped after update {global_step}, go on with --resume {run_dir}", file=sys.stderr)
            sys.exit(128 + stop_signals[0])
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, global_step)

        if evaluating:
            actor = copy.deepcopy(agent.actor).cpu()
            evaluation = evaluator.submit(evaluate, eval_envs, actor.act, args.eval_episodes)
            evaluated_step = global_step
            if not concurrent_eval or global_step == total_updates:
                record(evaluated_step, *evaluation.result())
                evaluation = None

    bar.close()
    if args.save_model:
        save_file({"args": vars(args), "agent": agent.state_dict()}, run_dir / "model.pt")
        print(f"model saved to {run_dir / 'model.pt'}")
    envs.close()
    eval_envs.close()
    evaluations_file.close()
    writer.close()
    print(f"before fine-tuning: {summaries[offline_updates]}")
    if online_successes:
        regret = 1 - np.mean(online_successes)
        print(f"regret (1 - success over the {len(online_successes)} online episodes): {regret:.3f}")
    updates = f"{offline_updates} offline and {total_updates - offline_updates} online updates"
    print(f"final: {args.env_id} with {args.dataset_id}, {updates}, seed {args.seed}: {summaries[total_updates]}")
