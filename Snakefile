# Targets and includes only; what a rule runs is in pipeline_lib.
from pathlib import Path

from snakemake.utils import min_version

sys.path.insert(0, str(workflow.basedir))
from pipeline_lib.stages import allocation, wiring

min_version("9.27")

PLAN = wiring.open_plan("config.yaml", config, Path(workflow.basedir), workflow.is_main_process)


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/results.smk"


rule all:
    default_target: True
    input:
        PLAN.targets(),


onstart:
    wiring.begin(workflow)


onerror:
    wiring.tell_failures(workflow)
    wiring.plan_again_if_damage_was_reported()
