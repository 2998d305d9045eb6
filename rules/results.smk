# Readable results: copies of published files.


localrules:
    all,
    experiment_result,
    sweep_result,
    table_result,
    publish_result,
    report_result,


rule experiment_result:
    input:
        lambda wildcards: wiring.view_inputs(PLAN, f"results/{wildcards.experiment}/{wildcards.task}.{wildcards.kind}"),
    output:
        report("results/{experiment}/{task}.{kind}", caption="../workflow/report/result.rst", category="Results", labels={"experiment": "{experiment}", "task": "{task}", "format": "{kind}"}),
    wildcard_constraints:
        experiment="(?!store|specs|work|logs|quarantine|sweeps|tables|publish)[a-z0-9._+-]+",
        kind="json|jsonl|md|yaml",
    params:
        source=lambda wildcards: wiring.view_source(PLAN, f"results/{wildcards.experiment}/{wildcards.task}.{wildcards.kind}"),
    log:
        "results/logs/view/{experiment}--{task}.{kind}.log",
    conda:
        "../envs/report.yaml"
    shell:
        VIEW


rule sweep_result:
    input:
        lambda wildcards: wiring.view_inputs(PLAN, f"results/sweeps/{wildcards.name}.{wildcards.kind}"),
    output:
        report("results/sweeps/{name}.{kind}", caption="../workflow/report/sweep.rst", category="Sweeps", labels={"sweep": "{name}", "format": "{kind}"}),
    wildcard_constraints:
        kind="csv|svg|png|jsonl|md|yaml",
    params:
        source=lambda wildcards: wiring.view_source(PLAN, f"results/sweeps/{wildcards.name}.{wildcards.kind}"),
    log:
        "results/logs/view/sweep--{name}.{kind}.log",
    conda:
        "../envs/report.yaml"
    shell:
        VIEW


rule table_result:
    input:
        lambda wildcards: wiring.view_inputs(PLAN, f"results/tables/{wildcards.name}.{wildcards.kind}"),
    output:
        report("results/tables/{name}.{kind}", caption="../workflow/report/table.rst", category="Tables", labels={"table": "{name}", "format": "{kind}"}),
    wildcard_constraints:
        kind="csv|md|svg",
    params:
        source=lambda wildcards: wiring.view_source(PLAN, f"results/tables/{wildcards.name}.{wildcards.kind}"),
    log:
        "results/logs/view/table--{name}.{kind}.log",
    conda:
        "../envs/report.yaml"
    shell:
        VIEW


rule publish_result:
    input:
        lambda wildcards: wiring.view_inputs(PLAN, f"results/publish/{wildcards.experiment}.json"),
    output:
        "results/publish/{experiment}.json",
    params:
        source=lambda wildcards: wiring.view_source(PLAN, f"results/publish/{wildcards.experiment}.json"),
    log:
        "results/logs/view/publish--{experiment}.log",
    conda:
        "../envs/report.yaml"
    shell:
        VIEW


rule report_result:
    input:
        lambda wildcards: wiring.view_inputs(PLAN, "results/report.html"),
    output:
        "results/report.html",
    params:
        source=lambda wildcards: wiring.view_source(PLAN, "results/report.html"),
    log:
        "results/logs/view/report.log",
    conda:
        "../envs/report.yaml"
    shell:
        VIEW
