"""A tiny environment, its unusable variants and Minari datasets for it; `--env-id tiny_env:Tiny-v0` finds it."""

import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

OBSERVATIONS = gym.spaces.Box(-10, 10, (3,))
ACTIONS = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))


class Tiny(gym.Env):
    """A point that drifts with the action, for ten steps.

    Once there are runs in the working directory, a file `die`, `raise` or `hang` beside them makes the next step do so.
    Dark-v0 cannot be rendered.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, observation_space=OBSERVATIONS, action_space=ACTIONS, render_mode=None):
        self.observation_space, self.action_space, self.render_mode = observation_space, action_space, render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=3).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        if Path("runs").exists():
            if Path("die").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if Path("raise").exists():
                raise ZeroDivisionError("the environment's own mistake")
            while Path("hang").exists():
                Path("hanging").touch()
                time.sleep(0.01)
        self.state[:2] += 0.1 * action
        distance = float(np.abs(self.state).sum())
        return self.state.copy(), -distance, False, False, {"success": distance < 2}

    def render(self):
        if self.spec.id == "Dark-v0":
            raise RuntimeError("no screen")
        return np.zeros((16, 16, 3), np.uint8)


class Ending(Tiny):
    """Where a start's first number is positive, the second step alone is a success and the fifth a termination.

    The third and later episodes of an evaluation give 100 more at each step.
    """

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.steps, self.ends, self.more = 0, obs[0] > 0, 100.0 * (1_000_002 <= seed < 1_001_000) if seed else 0.0
        return obs, info

    def step(self, action):
        obs, reward, _, truncated, _ = super().step(action)
        self.steps += 1
        success = self.ends and self.steps == 2
        return obs, reward + self.more, bool(self.ends and self.steps == 5), truncated, {"success": success}


class Unstable(Tiny):
    """Gives NaN in the third step of every second episode, but not of those that evaluations begin."""

    def reset(self, seed=None, options=None):
        self.steps, self.breaks = 0, seed and seed % 2 == 0 and not 1_000_000 <= seed < 1_001_000
        return super().reset(seed=seed)

    def step(self, action):
        obs, *more = super().step(action)
        self.steps += 1
        return (obs * np.nan if self.breaks and self.steps == 3 else obs), *more


VARIANTS = {
    "Tiny": {},
    "Dark": {},
    "Wide": {"observation_space": gym.spaces.Box(-10, 10, (4,))},
    "ZeroWidth": {"action_space": gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, 0], np.float32))},
    "DiscreteAction": {"action_space": gym.spaces.Discrete(3)},
    "MatrixAction": {"action_space": gym.spaces.Box(-1, 1, (2, 2))},
    "IntAction": {"action_space": gym.spaces.Box(-100, 100, (2,), np.int8)},
}
gym.register("Endless-v0", entry_point=Tiny)
gym.register("Ending-v0", entry_point="tiny_env:Ending", max_episode_steps=10)
gym.register("Unstable-v0", entry_point="tiny_env:Unstable", max_episode_steps=10)
for name, kwargs in VARIANTS.items():
    gym.register(f"{name}-v0", entry_point=Tiny, max_episode_steps=10, kwargs=kwargs)


def write_dataset(dataset_id, episodes=4, seed=0):
    """Random episodes of ten steps, each of which ends in a termination, into the Minari root."""
    import minari  # here, because the environments do without
    from minari.data_collector import EpisodeBuffer

    rng, buffers = np.random.default_rng(seed), []
    for _ in range(episodes):
        arrays = {
            "observations": rng.normal(size=(11, 3)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (10, 2)).astype(np.float32),
            "rewards": rng.normal(size=10),
            "terminations": np.arange(10) == 9,
            "truncations": np.zeros(10, bool),
        }
        buffers.append(EpisodeBuffer(**arrays))
    minari.create_dataset_from_buffers(dataset_id, buffers, observation_space=OBSERVATIONS, action_space=ACTIONS)
