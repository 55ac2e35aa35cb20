"""One command for a GPU machine: builds, tests every loss on the device, measures, writes one JSON; no network.

    python -m benchmarks.gpu                     all of it, in nine minutes: gpu.json in $OUT or benchmarks/results
    python -m benchmarks.gpu --budget 200        what fits into 200 seconds: measurements go by importance
    python -m benchmarks.gpu --plot gpu.json     draws a result, on any machine
    python -m benchmarks.gpu --dry-run           every step at tiny sizes on the CPU, the CUDA kernels emulated

Each step is a process of its own with a time limit: a kernel that hangs or faults takes its step with it, not the rest.
Steps keep what they have found in build/gpu/<step>.json, and the end of their output is in the result if they fail.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from . import report

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "build" / "gpu"
CHECKS = {"check cuda 1": ("cuda", 1), "check cuda 2": ("cuda", 2), "check triton": ("triton", 0)}
SANITIZERS = ("memcheck", "racecheck")


def report_to(name):
    """A dict of what a step finds, and a function that keeps it: the process may not live to its end."""
    found, path, start = {}, PARTS / f"{name}.json", time.monotonic()

    def save():
        found["seconds"] = round(time.monotonic() - start, 1)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(path)

    return found, save


class Job:
    """A step in a process group of its own, ended with all it started when its time is over."""

    def __init__(self, name, command, seconds, **env):
        self.name, self.start, self.seconds = name, time.monotonic(), seconds
        PARTS.mkdir(parents=True, exist_ok=True)
        self.log, self.part = PARTS / f"{name}.log", PARTS / f"{name}.json"
        self.part.unlink(missing_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                                            env={**os.environ, **env}, start_new_session=True)  # fmt: skip

    def finish(self):
        done = {"timed_out": False}
        try:
            self.process.wait(max(self.start + self.seconds - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            done["timed_out"] = True
            os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that the driver holds is left behind
                self.process.wait(10)
        done.update(code=self.process.poll(), seconds=round(time.monotonic() - self.start, 1))
        if self.part.exists():
            done.update(json.loads(self.part.read_text()))
        text = self.log.read_text(errors="replace")
        if done["code"] or self.name in SANITIZERS:
            done["output_tail"] = text[-3000:]
        print(f"{self.name}: {'out of time' if done['timed_out'] else done['code'] or 'done'}, {done['seconds']} s",
              flush=True)  # fmt: skip
        if done["code"]:
            print(text[-1500:], flush=True)
        return done


def own_step(name, options, seconds, *more):
    arguments = ["--step", name, "--budget", str(round(max(seconds - 10, 5))), *more]
    flags = [flag for flag in ("--quick", "--dry-run") if getattr(options, flag[2:].replace("-", "_"))]
    return Job(name, [sys.executable, "-m", "benchmarks.gpu", *arguments, *flags], seconds)


def build(seconds, cuda="1"):
    """For this device alone, which takes a third of the time; TORCH_CUDA_ARCH_LIST says otherwise."""
    probe = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    capability = found.stdout.strip() + ("a" if found.stdout.strip() == "9.0" else "")
    env = {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or capability, "KDKERNELS_CUDA": cuda}
    name = "build" if cuda == "1" else "build without CUDA"
    return Job(name, [sys.executable, "setup.py", "build_ext", "--inplace"], seconds, **env)


def sanitizer(tool, seconds):
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not program:
        return None
    code = "from benchmarks.gpu import checks; checks.tiny()"
    return Job(tool, [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code], seconds)


def in_processes(options, result):
    """The steps on a GPU. The checks run side by side, the measurements alone."""
    steps, end = result["steps"], time.monotonic() + options.budget
    left = lambda: end - time.monotonic()  # noqa: E731
    if not (options.skip_build or options.dry_run):
        steps["build"] = build(min(240, left() / 2)).finish()
        if steps["build"]["code"] != 0:  # the rest of the package is still worth measuring
            steps["build without CUDA"] = build(min(60, left() / 4), "0").finish()
        options.save()
    seconds = min(60 if options.quick else 130, left() * 0.4)
    jobs = [own_step(name, options, seconds) for name in CHECKS]
    if not options.dry_run:
        jobs += [job for tool in SANITIZERS if (job := sanitizer(tool, seconds))]
    for job in jobs:
        steps[job.name] = job.finish()
        options.save()
    broken = [name.removeprefix("check ") for name in CHECKS if steps[name]["code"] != 0]
    steps["measure"] = own_step("measure", options, left() - 5, "--without", ",".join(broken)).finish()


def in_this_process(options, result):
    for name in (*CHECKS, "measure"):
        try:
            PARTS.mkdir(parents=True, exist_ok=True)
            step(name, options)
            result["steps"][name] = {"code": 0, **json.loads((PARTS / f"{name}.json").read_text())}
        except Exception:  # whatever it is, the other steps are worth having
            result["steps"][name] = {"code": 1, "output_tail": traceback.format_exc()}
    from kdkernels.backends import cuda

    cuda.form = 0


def step(name, options):
    """One step, in this process."""
    end = time.monotonic() + options.budget
    found, save = report_to(name)
    device = prepare(options.dry_run)
    if name == "measure":
        from . import measure

        measure.measure(found, save, end, device, options)
    else:
        from . import checks

        checks.check(*CHECKS[name], found, save, end, device, options)
    found["finished"] = True
    save()


def prepare(dry_run):
    """The device; without one the CUDA kernels are emulated."""
    sys.path.insert(0, str(ROOT / "tests"))
    if not dry_run:
        return "cuda"
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    import emulated

    emulated.install()
    return "cpu"


def versions():
    """What the figures are worth knowing with; asked in another process, for this one holds no device."""
    code = """if True:
        import importlib.metadata as m, json, platform, torch
        def of(name):
            try: return m.version(name)
            except m.PackageNotFoundError: return None
        d = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
        print(json.dumps(dict(device=d and d.name, processors=d and d.multi_processor_count,
            memory=d and d.total_memory, l2=d and d.L2_cache_size, python=platform.python_version(),
            torch=torch.__version__, triton=of("triton"), numpy=of("numpy"), liger=of("liger-kernel"))))"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    facts = json.loads(found.stdout) if found.returncode == 0 else {"error": found.stderr[-500:]}
    return {**facts, "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "nvcc": output("nvcc", "--version").splitlines()[-1:], "commit": output("git", "rev-parse", "HEAD"),
            "changed": output("git", "status", "--porcelain", "-uno").splitlines(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=folder, help="folder of gpu.json and the plots")
    parser.add_argument("--budget", type=float, default=520, help="seconds for all of it (default: 520)")
    parser.add_argument("--quick", action="store_true", help="few shapes, no torch.compile")
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw this result and stop")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: tiny sizes, emulated kernels")
    parser.add_argument("--spawn", action="store_true", help="a process for each step in a dry run too")
    parser.add_argument("--step", choices=[*CHECKS, "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--without", default="", help="contenders to leave out, such as 'cuda 2'")
    options = parser.parse_args(arguments)
    if options.step:
        return step(options.step, options)
    if options.plot:
        return report.plot(json.loads(options.plot.read_text()), options.plot.with_suffix(""))
    start, result = time.monotonic(), {"machine": versions(), "steps": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("gpu-dry-run.json" if options.dry_run else "gpu.json")
    options.save = lambda: path.write_text(json.dumps(result, indent=1) + "\n")
    try:
        (in_this_process if options.dry_run and not options.spawn else in_processes)(options, result)
    finally:
        result["seconds"] = round(time.monotonic() - start, 1)
        options.save()
    report.show(result)
    try:
        report.plot(result, path.with_suffix(""))
    except ImportError:
        print("no matplotlib here; later: python -m benchmarks.gpu --plot", path)
    print(path, f"{result['seconds']} s")
    return result


if __name__ == "__main__":
    main()
