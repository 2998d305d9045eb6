# From a checkpoint to one arm of an evaluation, and to the arms side by side.

rule evaluate:
    input:
        needs("evaluate"),
    output:
        "results/store/evaluate/{id}/manifest.json",
    log:
        "results/logs/evaluate/{id}.log",
    conda:
        "../envs/evaluate.yaml"
    threads: run_setting("evaluate", "threads", 1)
    resources:
        gpu=one_gpu("evaluate"),
        mem_mb=memory("evaluate", "eval_mem_mb", 8000),
        **slurm_only(
            runtime=run_setting("evaluate", "eval_runtime_min", 60),
            slurm_extra=slurm_options("evaluate"),
        ),
    shell:
        STAGE


rule result:
    localrule: True
    input:
        needs("result"),
    output:
        "results/store/result/{id}/manifest.json",
    log:
        "results/logs/result/{id}.log",
    conda:
        "../envs/report.yaml"
    shell:
        STAGE


rule sweep:
    input:
        needs("sweep"),
    output:
        "results/store/sweep/{id}/manifest.json",
    log:
        "results/logs/sweep/{id}.log",
    conda:
        "../envs/evaluate.yaml"
    threads: 2
    resources:
        gpu=one_gpu("sweep"),
        mem_mb=memory("sweep", "eval_mem_mb", 8000),
        **slurm_only(
            runtime=run_setting("sweep", "eval_runtime_min", 60),
            slurm_extra=slurm_options("sweep"),
        ),
    shell:
        STAGE


rule table:
    localrule: True
    input:
        needs("table"),
    output:
        "results/store/table/{id}/manifest.json",
    log:
        "results/logs/table/{id}.log",
    conda:
        "../envs/report.yaml"
    shell:
        STAGE


rule report:
    localrule: True
    input:
        needs("report"),
    output:
        "results/store/report/{id}/manifest.json",
    log:
        "results/logs/report/{id}.log",
    conda:
        "../envs/report.yaml"
    shell:
        STAGE


rule publish:
    localrule: NETWORK_IS_HERE
    input:
        needs("publish"),
    output:
        "results/store/publish/{id}/manifest.json",
    log:
        "results/logs/publish/{id}.log",
    conda:
        "../envs/report.yaml"
    resources:
        **slurm_only(slurm_extra=slurm_options("publish")),
    shell:
        STAGE

