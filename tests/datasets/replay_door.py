"""Record bundled/door/demos-v0: the human demonstrations of door, replayed under D4RL's rules.

    python tests/datasets/replay_door.py door-v0_demos.pickle

The README beside this file says where that file comes from and what was recorded.
"""

import os
import pickle
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent.parent))
import iql_continuous as iql  # noqa: E402


def replay(demonstration):
    """The demonstration's actions from its first state, in the installed MuJoCo, with D4RL's rewards."""
    actions = np.clip(np.float32(demonstration["actions"]), -1, 1)
    env = iql.D4RLRules(gym.make("AdroitHandDoor-v1", max_episode_steps=len(actions)))
    observations, rewards = [env.reset(options={"initial_state_dict": demonstration["init_state_dict"]})[0]], []
    for action in actions:
        obs, reward, _, truncated, _ = env.step(action)
        observations.append(obs)
        rewards.append(reward)
    assert truncated
    ends = np.arange(len(actions)) == len(actions) - 1
    columns = {"actions": actions, "rewards": np.array(rewards), "terminations": ends & False, "truncations": ends}
    return EpisodeBuffer(observations=np.array(observations), **columns)


def compress(path):
    """Write an HDF5 file anew, with every column compressed: Minari has no setting for it."""
    with h5py.File(path) as old, h5py.File(path.with_suffix(".tmp"), "w") as new:

        def copy(name, item):
            if isinstance(item, h5py.Group):
                new.create_group(name).attrs.update(item.attrs)
            else:
                new.create_dataset(name, data=item[()], compression="gzip", shuffle=True)

        new.attrs.update(old.attrs)
        old.visititems(copy)
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        demonstrations = pickle.load(file)
    episodes = [replay(demonstration) for demonstration in demonstrations]
    os.environ["MINARI_DATASETS_PATH"] = str(ROOT)
    shutil.rmtree(ROOT / "bundled/door/demos-v0", ignore_errors=True)
    minari.create_dataset_from_buffers(
        "bundled/door/demos-v0",
        episodes,
        env=gym.make("AdroitHandDoor-v1", max_episode_steps=300),
        algorithm_name="human demonstrations, replayed",
        author="Rajeswaran et al. 2018 (demonstrations, Apache-2.0)",
        author_email="none@example.org",
        code_permalink="https://github.com/aravindr93/hand_dapg",
        description="25 human demonstrations of door, replayed under D4RL's rules, see tests/datasets/README.md.",
    )
    compress(ROOT / "bundled/door/demos-v0/data/main_data.hdf5")
    recorded, replayed = [[e["rewards"].sum() for e in demonstrations], [e.rewards.sum() for e in episodes]]
    steps = sum(len(episode.rewards) for episode in episodes)
    print(f"{len(episodes)} episodes, {steps} steps, return {np.mean(replayed):.1f} (recorded {np.mean(recorded):.1f})")
