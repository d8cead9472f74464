"""Small environments, each with a peculiarity of those that people have; `--env-id odd_env:Parts-v0` finds one."""

from collections import OrderedDict

import gymnasium as gym
import numpy as np


class Parts(gym.Env):
    """Observations are a Dict whose keys are not in alphabetical order."""

    observation_space = gym.spaces.Dict(OrderedDict(z=gym.spaces.Box(-5, 5, (1,)), a=gym.spaces.Box(-5, 5, (2, 2))))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        return OrderedDict(z=np.array([1], np.float32), a=np.array([[2, 3], [4, 5]], np.float32)), {}


class Image(gym.Env):
    """Observations are bytes."""

    observation_space, action_space = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        return np.arange(200, 248, dtype=np.uint8).reshape(4, 4, 3), {}


class Staircase(gym.Env):
    """The k-th evaluation episode ends after 1 + k % 5 steps, the i-th of which gives k + i.

    An odd one succeeds in its first step and in no other; an even one says no word of success, as none does if
    `reports` is False. An episode that follows without a seed is another one: it gives 1000 a step and succeeds.
    """

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, reports=True):
        self.reports = reports

    def reset(self, seed=None, options=None):
        self.k, self.steps = None if seed is None else seed - 1_000_000, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = np.zeros(1, np.float32)
        if self.k is None:
            return obs, 1000.0, self.steps == 50, False, {"success": np.True_} if self.reports else {}
        ended = self.steps == 1 + self.k % 5
        info = {"success": np.bool_(self.steps == 1)} if self.reports and self.k % 2 else {}
        return obs, float(self.k + self.steps), ended and self.k % 3 == 0, ended and self.k % 3 > 0, info


for kind in ("Parts", "Image"):
    gym.register(f"{kind}-v0", entry_point=f"odd_env:{kind}", max_episode_steps=10)
