"""What recipes have in common, trained once: teachers, and students with the same name, settings and first loss."""

import contextlib
import fcntl
import hashlib
import json
import shutil
import time

from kdkernels import files


class FirstLoss(Exception):
    """Carries the first loss of a training run out of it."""


@contextlib.contextmanager
def locked(path):
    """One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def first_loss(train, where, name, net, updates, options):
    """Of the run as it would start; leaves net as it was."""

    def stop(batch):
        raise FirstLoss(updates[0].loss(batch).item())

    kept = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        train(where, name, net, [updates[0]._replace(loss=stop), *updates[1:]], **options)
    except FirstLoss as found:
        return found.args[0]
    finally:
        net.load_state_dict(kept)


def sharing(train, common, spent, share=1.0):
    """Lab.train, which trains nothing that `common` has, and adds up the seconds of teachers in `spent`: of the
    processor, which other work on the machine does not prolong."""

    def shared(self, name, net, updates, **options):
        self.share, start = share, time.process_time()
        if self.folder == self.cache:
            with locked(self.cache / f".{name}.lock"):
                found = train(self, name, net, updates, **options)
            spent["teachers"] += time.process_time() - start
            return found
        mine = self.folder / f"{name}.safetensors"
        if mine.exists():
            return train(self, name, net, updates, **options)
        settings = {k: v for k, v in options.items() if k not in ("data", "teacher")}
        about = [name, self.seed, share, settings, [u.lr for u in updates]]
        about.append(first_loss(train, self, name, net, updates, options))
        theirs = common / f"{name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.safetensors"
        with locked(theirs.with_suffix(".lock")):
            if theirs.exists():
                with files.replacing(mine) as temporary:
                    shutil.copyfile(theirs, temporary)
            found = train(self, name, net, updates, **options)
            if not theirs.exists() and mine.exists():
                with files.replacing(theirs) as temporary:
                    shutil.copyfile(mine, temporary)
        return found

    return shared
