"""Small environments, each with a peculiarity of those that people have; `--env-id odd_env:Odd-v0` finds one."""

from collections import OrderedDict

import gymnasium as gym
import numpy as np

UNBOUNDED = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)


class Point(gym.Env):
    """Lasts ten steps at most and wants actions of its own shape and dtype. Every step gives the step's number.

    An episode of odd seed ends after five steps, as a termination and with a success; no other says a word of success.
    """

    def __init__(self, kind, render_mode=None):  # a name, as a registered environment's arguments are written to JSON
        options = {"observation_space": UNBOUNDED, "offset": 0.0, "array_reward": False, **KINDS[kind]}
        self.action_space, self.observation_space = options["action_space"], options["observation_space"]
        self.offset, self.array_reward = options["offset"], options["array_reward"]

    def observe(self):
        if self.observation_space.dtype == np.uint8:
            return self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)
        obs = self.offset + self.np_random.normal(size=self.observation_space.shape)
        obs[-1] = 0.5
        return obs

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.odd = 0, seed is not None and seed % 2 == 1
        return self.observe(), {}

    def step(self, action):
        box = self.action_space
        if np.shape(action) != box.shape or action.dtype != box.dtype or not (box.low <= action).all():
            raise ValueError(f"{action!r} is no action of {box}")
        self.action, self.steps = action, self.steps + 1
        ended = self.odd and self.steps == 5
        reward = np.array([self.steps], np.float32) if self.array_reward else float(self.steps)
        success = np.array([True]) if self.array_reward else True
        return self.observe(), reward, ended, False, {"success": success} if ended else {}


class Parts(gym.Env):
    """Observations are a Dict whose keys are not in alphabetical order."""

    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, kind, render_mode=None):
        z = gym.spaces.Box(-5, 5, (1,))
        self.observation_space = gym.spaces.Dict(OrderedDict([("z", z), ("a", PARTS[kind])]))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return OrderedDict(z=np.array([1], np.float32), a=np.array([[2, 3], [4, 5]], np.float32)), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


class NoRenderMode(gym.Env):
    """Cannot be rendered, and takes no argument for it."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))


def box(low, high, dtype=np.float32):
    return gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


BIG = np.finfo(np.float32).max
MATRIX = box([[-1, -1], [0, 0]], [[1, 1], [4, 4]])
KINDS = {
    "Matrix": {"action_space": MATRIX},
    "Scalar": {"action_space": box(-1, 1)},
    "IntAction": {"action_space": box([-100, -100], [100, 100], np.int8)},
    "Asymmetric": {"action_space": box([-3, 0], [1, 100])},
    "ZeroWidth": {"action_space": box([-1, 2], [1, 2])},
    "Huge": {"action_space": box([-1, -1, -BIG], [1, 1, BIG])},
    "Image": {"action_space": box([-1], [1]), "observation_space": gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)},
    "ArrayReward": {"action_space": box([-1], [1]), "array_reward": True},
    "Odd": {"action_space": MATRIX, "offset": 1e8},
}
PARTS = {
    "Parts": gym.spaces.Box(-5, 5, (2, 2)),
    "NestedParts": gym.spaces.Dict({"b": gym.spaces.Box(-1, 1, (1,))}),
    "DiscreteParts": gym.spaces.Discrete(3),
}
for entry_point, kinds in (("odd_env:Point", KINDS), ("odd_env:Parts", PARTS)):
    for kind in kinds:
        gym.register(f"{kind}-v0", entry_point=entry_point, max_episode_steps=10, kwargs={"kind": kind})
gym.register("NoRenderMode-v0", entry_point="odd_env:NoRenderMode", max_episode_steps=10)
