"""What must hold between the fields of a `SweepConfig`."""

from collections.abc import Iterator
from collections.abc import Mapping

from tune_topkd.config.choices import ASHA
from tune_topkd.config.choices import SAMPLERS
from tune_topkd.config.choices import SCHEDULERS
from tune_topkd.config.errors import Problem
from tune_topkd.config.errors import unknown_choice
from tune_topkd.config.sections import AUTO
from tune_topkd.config.sections import EFFECTS
from tune_topkd.config.sections import INTEGER_PARAMETERS
from tune_topkd.config.sections import LARGEST_SEED
from tune_topkd.config.sections import OBJECTIVE_EMA
from tune_topkd.config.sections import RECIPE_PARAMETERS
from tune_topkd.config.sections import PairConfig
from tune_topkd.config.sections import ParameterRange
from tune_topkd.config.sections import RelativeConfig
from tune_topkd.config.sections import SweepConfig


def problems_of_sweep(config: SweepConfig) -> list[Problem]:
    """Every rule between sections that a config of valid sections breaks."""
    return [*_space_problems(config), *problems_of_pair(config), *_sweep_problems(config)]


def problems_of_new_sweep(config: SweepConfig) -> list[Problem]:
    """What a new sweep may not ask for, though one that an older version has begun may go on with it."""
    gpus = config.sweep.gpus_per_trial
    return [] if isinstance(gpus, str) or gpus < 2 else list(_problems_of_several_gpus(config, int(gpus)))


def _problems_of_several_gpus(config: SweepConfig, gpus: int) -> Iterator[Problem]:
    """What trials that train on several GPUs each may not ask for."""
    each = f"each of the {gpus} GPUs of a trial (sweep.gpus_per_trial) trains on its part of a batch"
    if config.sweep.cpus_per_trial == AUTO:
        rule = f"must be a number where a trial has {gpus} GPUs (sweep.gpus_per_trial): there are no shares to compare"
        yield Problem(key="sweep.cpus_per_trial", rule=rule, value=AUTO, has_value=True)
    if config.data.augment.mixup:
        rule = f"must be 0: {each}, and mixup mixes images of the whole batch"
        yield Problem(key="data.augment.mixup", rule=rule, value=config.data.augment.mixup, has_value=True)
    searched = config.space.get("batch_size")
    if searched is not None and searched.choices is None:
        rule = f"must be a list of choices, each a multiple of {gpus}: {each}"
        yield Problem(key="space.batch_size", rule=rule)
        return
    sizes = [config.recipe.batch_size] if searched is None else searched.choices or []
    key = "recipe.batch_size" if searched is None else "space.batch_size"
    for size in sizes:
        if not isinstance(size, int) or size % gpus:
            rule = f"must be a multiple of {gpus}: {each}"
            yield Problem(key=key, rule=rule, value=size, has_value=True)


def problems_of_pair(config: PairConfig) -> list[Problem]:
    """Those of the rules that concern a single training too."""
    return [*_recipe_problems(config), *_method_problems(config)]


def _space_problems(config: SweepConfig) -> list[Problem]:
    problems = []
    numbers = {name for name, r in config.space.items() if r.choices is None}
    if "scaling_rule" in config.space:
        rule = "is code, which is not searched: name one under loss.scaling_rule, and run a sweep for each"
        problems.append(Problem(key="space.scaling_rule", rule=rule))
    for name, parameter in config.space.items():
        for bound in parameter.bound_names():
            if bound not in numbers or bound == name:
                others = sorted(numbers - {name})
                rule = f"a bound must be a number or the name of another range of the space; {unknown_choice(bound, others)}"
                problems.append(Problem(key=f"space.{name}", rule=rule, value=bound, has_value=True))
            elif name in RECIPE_PARAMETERS and bound not in RECIPE_PARAMETERS:
                rule = "a range of the recipe, which the baselines search too, cannot be bound to one of the loss"
                problems.append(Problem(key=f"space.{name}", rule=rule, value=bound, has_value=True))
        if name in config.loss:
            problems.append(Problem(key=f"loss.{name}", rule="is both fixed here and searched under space; choose one"))
        kind_int = _is_integer(name, parameter)
        for side in ("low", "high"):
            bound = getattr(parameter, side)
            if kind_int and isinstance(bound, float) and bound != int(bound):
                problems.append(
                    Problem(key=f"space.{name}.{side}", rule="must be a whole number", value=bound, has_value=True)
                )
    if not problems and (cycle := _cycle(config.space)):
        problems.append(
            Problem(key=f"space.{cycle[0]}", rule=f"bounds name one another in a circle: {' → '.join(cycle)}")
        )
    if config.relative:
        problems += _relative_problems(config, config.relative)
    return problems


def _is_integer(name: str, parameter: ParameterRange) -> bool:
    return parameter.type == "int" or (parameter.type is None and name in INTEGER_PARAMETERS)


def _cycle(space: Mapping[str, ParameterRange]) -> list[str]:
    for start in space:
        paths = [[start, name] for name in space[start].bound_names()]
        seen: set[str] = set()
        while paths:
            path = paths.pop()
            if path[-1] == start:
                return path
            if path[-1] not in seen:
                seen.add(path[-1])
                paths += [[*path, name] for name in space[path[-1]].bound_names()]
    return []


def _relative_problems(config: SweepConfig, relative: RelativeConfig) -> list[Problem]:
    problems = []
    for name in relative.of:
        parameter = config.space.get(name)
        if parameter is None:
            rule = f"each must be a range of the space; {unknown_choice(name, config.space)}"
            problems.append(Problem(key="relative.of", rule=rule, value=name, has_value=True))
        elif name in RECIPE_PARAMETERS or parameter.choices is not None or _is_integer(name, parameter):
            rule = "a relative weight must be a range of floats, and of the loss"
            problems.append(Problem(key=f"space.{name}", rule=rule))
        elif isinstance(parameter.low, str) or parameter.low is None or parameter.low <= 0:
            rule = "a relative weight must be above 0"
            problems.append(Problem(key=f"space.{name}.low", rule=rule, value=parameter.low, has_value=True))
    for name, parameter in config.space.items():
        for bound in parameter.bound_names():
            if (name in relative.of) != (bound in relative.of):
                rule = "a bound cannot lead into or out of relative.of: scaling would break it"
                problems.append(Problem(key=f"space.{name}", rule=rule, value=bound, has_value=True))
    return [*problems, *_effect_problems(config, relative)] if relative.units else problems


def _effect_problems(config: SweepConfig, relative: RelativeConfig) -> Iterator[Problem]:
    """What `units: effect` cannot be had with."""
    if "topkd" not in config.method.split("+"):
        rule = f"is defined for topkd and what it is plugged into, and the method is {config.method}: leave it out"
        yield Problem(key="relative.units", rule=rule, value=relative.units, has_value=True)
        return
    for name in relative.of:
        for bound in config.space[name].bound_names() if name in config.space else ():
            rule = "a weight drawn by its effect has no bound that is another one: their units differ"
            yield Problem(key=f"space.{name}", rule=rule, value=bound, has_value=True)
    for name in sorted({of for weight in relative.of for of in EFFECTS.get(weight, {})}):
        values = config.space[name].choices or [] if name in config.space else [config.loss.get(name, 1.0)]
        for value in values:
            if isinstance(value, bool | str) or value < 0:
                key = f"space.{name}" if name in config.space else f"loss.{name}"
                rule = (
                    "must be a number, at least 0: relative.units asks for the effect of the weights that it is part of"
                )
                yield Problem(key=key, rule=rule, value=value, has_value=True)


def _recipe_problems(config: PairConfig) -> list[Problem]:
    problems = []
    recipes = {"recipe": config.recipe, "teacher.recipe": config.teacher and config.teacher.recipe}
    for key, recipe in recipes.items():
        if recipe and recipe.schedule == "step" and any(m >= recipe.epochs for m in recipe.milestones):
            rule = f"a milestone lies at or after the last epoch ({recipe.epochs}); shares below 1 follow the epochs"
            problems.append(Problem(key=f"{key}.milestones", rule=rule, value=recipe.milestones, has_value=True))
        if recipe and key == "teacher.recipe" and recipe.log_grad_norms:
            rule = "is of the student's trainings, recipe.log_grad_norms: a teacher reports no metrics"
            problems.append(Problem(key=f"{key}.log_grad_norms", rule=rule, value=True, has_value=True))
        if recipe and (recipe.distill_warmup or 0) > recipe.epochs:
            rule = f"must be at most the epochs, {recipe.epochs}: the distillation would never have its full weight"
            value = recipe.distill_warmup
            problems.append(Problem(key=f"{key}.distill_warmup", rule=rule, value=value, has_value=True))
    return problems


def _sweep_problems(config: SweepConfig) -> list[Problem]:
    problems = []
    if config.data.selection != "validation":
        rule = (
            "a sweep never looks at the test set; `train` takes it, to compare with published rows, and `confirm` measures "
            "a sweep's answer on it, once"
        )
        value = config.data.selection
        problems.append(Problem(key="data.selection", rule=rule, value=value, has_value=True))
    learning = [m for m in (config.baselines.methods if config.baselines else ()) if m in ("kd", "dkd", "lskd")]
    if config.teacher is None and learning:
        rule = f"{learning[0]} learns from a teacher, and there is none; choose [ce], or null"
        problems.append(Problem(key="baselines.methods", rule=rule))
    if config.baselines and config.baselines.match and not learning:
        rule = "there is no baseline to tune alike: that is for kd, dkd and lskd; name one in baselines.methods"
        problems.append(Problem(key="baselines.match", rule=rule, value=True, has_value=True))
    asha = config.sweep.asha
    if asha and asha.grace_epochs > config.recipe.epochs:
        ninth = max(1, config.recipe.epochs // 9)
        rule = (
            f"must be at most recipe.epochs = {config.recipe.epochs}; --set sweep.asha.grace_epochs={ninth} has rungs that "
            "fit, --set sweep.asha=null lets every trial run to the end"
        )
        problems.append(Problem(key="sweep.asha.grace_epochs", rule=rule, value=asha.grace_epochs, has_value=True))
    if config.sweep.rung_metric == OBJECTIVE_EMA and config.recipe.ema is None:
        rule = "needs recipe.ema, such as {decay_epochs: 0.4}"
        problems.append(Problem(key="sweep.rung_metric", rule=rule, value=config.sweep.rung_metric, has_value=True))
    most, asked = config.sweep.max_concurrent, config.sweep.autoscale_to
    if most is not None and asked is not None and asked > most:
        rule = f"must be at most sweep.max_concurrent = {most}: nodes that are beyond it would stay idle"
        problems.append(Problem(key="sweep.autoscale_to", rule=rule, value=asked, has_value=True))
    for number, point in enumerate(config.sweep.points or ()):
        for name in sorted(set(point) - set(config.space)):
            rule = f"is not searched; {unknown_choice(name, config.space)}"
            key = f"sweep.points.{number}.{name}"
            problems.append(Problem(key=key, rule=rule, value=point[name], has_value=True))
    finalists = config.sweep.finalists
    if finalists and config.sweep.seed + finalists.seeds > LARGEST_SEED:
        rule = f"the seeds up to sweep.seed + {finalists.seeds} must be at most {LARGEST_SEED:,}"
        problems.append(Problem(key="sweep.seed", rule=rule, value=config.sweep.seed, has_value=True))
    return [*problems, *budget_problems(config), *_choice_problems(config)]


def budget_problems(config: SweepConfig) -> Iterator[Problem]:
    """A limit that no trial could ever come to, as its share of a node stands."""
    settings = config.sweep
    if settings.gpu_hours is not None and settings.gpus_per_trial == 0:
        rule = "no trial has a GPU (sweep.gpus_per_trial is 0), so none would be counted; give sweep.cpu_hours or "
        yield Problem(key="sweep.gpu_hours", rule=f"{rule}sweep.time_budget", value=settings.gpu_hours, has_value=True)


def _choice_problems(config: SweepConfig) -> Iterator[Problem]:
    """Settings that the sampler or the scheduler does not take: those that have names are set elsewhere."""
    sampler, scheduler = config.sweep.sampler, config.sweep.scheduler
    if config.sweep.asha is not None and scheduler.name != ASHA:
        rule = f"is of the scheduler asha, but sweep.scheduler is {scheduler.name}: set it to null, or leave one of them out"
        yield Problem(key="sweep.asha", rule=rule)
    startup = "its random proposals are sweep.startup_trials"
    cures = {"tpe": startup, "gp": startup, ASHA: "its rungs are set under sweep.asha"}
    for key, chosen, known in (("sampler", sampler, SAMPLERS), ("scheduler", scheduler, SCHEDULERS)):
        for option, value in chosen.options.items() if chosen.name in known else ():
            rule = f"{chosen.name} takes no options here; {cures.get(chosen.name, 'leave it out')}"
            yield Problem(key=f"sweep.{key}.{option}", rule=rule, value=value, has_value=True)


def _method_problems(config: PairConfig) -> list[Problem]:
    problems = []
    if config.teacher is None and config.method != "ce":
        problems.append(Problem(key="teacher", rule=f"is required but missing: method {config.method} learns from one"))
    if config.data.augment.mixup and "topkd" in config.method.split("+"):
        rule = (
            "mixup gives an image two labels, and the Top-K scaling module amplifies the one ground truth: no rule is "
            "defined for both; set it to 0, or choose a method without topkd"
        )
        value = config.data.augment.mixup
        problems.append(Problem(key="data.augment.mixup", rule=rule, value=value, has_value=True))
    for key, recipe in {"recipe": config.recipe, "teacher.recipe": config.teacher and config.teacher.recipe}.items():
        if recipe and recipe.warmup_epochs >= recipe.epochs:
            rule = f"must be below the epochs, {recipe.epochs}"
            problems.append(Problem(key=f"{key}.warmup_epochs", rule=rule, value=recipe.warmup_epochs, has_value=True))
    return problems
