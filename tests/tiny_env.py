"""Tiny environments, some of them odd or unusable, and Minari datasets; `--env-id tiny_env:Tiny-v0` finds one."""

import multiprocessing
import os
import time
from collections import OrderedDict
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer


def box(low, high):
    return gym.spaces.Box(*np.array([low, high], np.float32))


OBSERVATIONS, ACTIONS = gym.spaces.Box(-10, 10, (3,)), box([-2, 0], [2, 1])


class Tiny(gym.Env):
    """A point that drifts with the action, for ten steps. Dark-v0 cannot be rendered, Silent-v0 knows no success.

    A file `hang` in the working directory names another one: once that exists, a step waits, and leaves its process
    in `hanging`. With `loop` in `hang`, only the process that learns does so.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, observation_space=OBSERVATIONS, action_space=ACTIONS, render_mode=None):
        self.observation_space, self.action_space, self.render_mode = observation_space, action_space, render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.normal(size=3).astype(np.float32), 0
        return self.state.copy(), {}

    def step(self, action):
        while Path("hang").exists():
            pattern, *loop = Path("hang").read_text().split()
            if (loop and multiprocessing.parent_process()) or not any(Path().glob(pattern)):
                break
            Path("hanging").write_text(f"{os.getpid()} ")
            time.sleep(0.01)
        self.state[:2] += 0.1 * action
        self.steps += 1
        distance = float(np.abs(self.state).sum())
        return self.state.copy(), -distance, False, False, {} if "Silent" in self.spec.id else {"success": distance < 2}

    def render(self):
        if self.spec.id == "Dark-v0":
            raise RuntimeError("no screen")
        return np.zeros((16, 16, 3), np.uint8)


class Ending(Tiny):
    """Where a start's first number is positive, the fifth step is a termination, and the second alone may be a success.

    Elsewhere no word of success is said. What follows an episode without a seed ends with a success.
    """

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.ends, self.wins = obs[0] > 0 or seed is None, obs[1] > 0 or seed is None
        return obs, info

    def step(self, action):
        obs, reward, _, truncated, _ = super().step(action)
        info = {"success": bool(self.wins and self.steps == 2)} if self.ends else {}
        return obs, reward, bool(self.ends and self.steps == 5), truncated, info


class Unstable(Tiny):
    """Gives NaN in the third step of every second episode, but not of those that evaluations begin."""

    def reset(self, seed=None, options=None):
        self.breaks = seed and seed % 2 == 0 and not 1_000_000 <= seed < 1_001_000
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, *more = super().step(action)
        if self.breaks and self.steps == 3:
            obs, reward = (obs, np.nan) if self.spec.id == "Unpaid-v0" else (obs * [1, np.nan, 1], reward)
        return obs, reward, *more


class Parts(Tiny):
    """Observations are a Dict whose keys are not in alphabetical order."""

    parts = gym.spaces.Dict(OrderedDict(z=gym.spaces.Box(-5, 5, (1,)), a=gym.spaces.Box(-5, 5, (1, 2))))

    def __init__(self):
        super().__init__(self.parts)

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return OrderedDict(z=obs[:1], a=obs[None, 1:]), info

    def step(self, action):
        obs, *more = super().step(action)
        return OrderedDict(z=obs[:1], a=obs[None, 1:]), *more


UNFIT_ACTIONS = {"ZeroWidth": box([-1, 0], [1, 0]), "HalfOpen": box([-1, 0], [1, np.inf])}
UNFIT_ACTIONS |= {"Discrete": gym.spaces.Discrete(3), "Matrix": gym.spaces.Box(-1, 1, (2, 2))}
UNFIT_ACTIONS |= {"Int": gym.spaces.Box(-100, 100, (2,), np.int8)}
for name in "Tiny Dark Silent Ending Unstable Unpaid Parts Wide Endless".split():
    entry_point = globals().get({"Unpaid": "Unstable"}.get(name, name), Tiny)
    kwargs = {"observation_space": gym.spaces.Box(-9, 9, (2, 2))} if name == "Wide" else {}
    steps = None if name == "Endless" else 10
    gym.register(f"{name}-v0", f"tiny_env:{entry_point.__name__}", max_episode_steps=steps, kwargs=kwargs)
for name, space in UNFIT_ACTIONS.items():
    gym.register(f"{name}-v0", Tiny, max_episode_steps=10, kwargs={"action_space": space})


def episode(steps=10, seed=0, **arrays):
    """An episode as Tiny-v0 has them, but for these `arrays`."""
    rng, last = np.random.default_rng(seed), np.arange(steps) == steps - 1
    observations = rng.normal(size=(steps + 1, 3)).astype(np.float32)
    actions, rewards = rng.uniform(-1, 1, (steps, 2)).astype(np.float32), rng.normal(size=steps)
    good = {"observations": observations, "actions": actions, "rewards": rewards}
    return EpisodeBuffer(**{**good, "terminations": last & False, "truncations": last, **arrays})


def write(dataset_id, *episodes, observation_space=OBSERVATIONS, action_space=ACTIONS, **more):
    """A dataset in the Minari root."""
    spaces = {"observation_space": observation_space, "action_space": action_space}
    return minari.create_dataset_from_buffers(dataset_id, list(episodes), **spaces, **more)
