# One rule for every node of the run that config["params"] names; everything about nodes is in nbs/01_engine.ipynb.
# Use it through `neurocodec run`, or alone: snakemake --config params=params/nano.yaml
from neurocodec.core.engine import command, cost, drop_stale_stamps, jobs, model_shape
from neurocodec.core.run import read_params

overrides = config.get("overrides", {})
run = read_params(config["params"])
shape = model_shape(run.model)
layers = [int(x) for x in config["layers"]] if "layers" in config else None  # snakemake reads --config as text
todo = jobs(run, overrides, layers, config.get("until", ""))
drop_stale_stamps(todo)
stamps = {j.name: str(j.stamp) for j in todo}
costs = {j.name: cost(j, shape, 1e11) for j in todo}
urgency = {}  # seconds of the longest way from a node's start to the end of the run
for j in reversed(todo): urgency[j.name] = costs[j.name].seconds + max((urgency[k.name] for k in todo if j.name in k.needs), default=0)


rule all:
    input: list(stamps.values())


for job in todo:
    rule:
        name: job.name.replace("/", "_")
        # stamps are named by key, so their age says nothing: `ancient`
        input: [ancient(stamps[n]) for n in job.needs]
        output: touch(stamps[job.name])
        threads: job.threads
        priority: int(urgency[job.name])
        resources: mem_mb=int(costs[job.name].memory_mb)
        params: command=command(job, config["params"], overrides)
        shell: "exec {params.command} --threads {threads}"
