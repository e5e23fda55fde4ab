//! `host-rank`: one rank of a run, or the process of a template. Started by `host run`, not by hand.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use host::config::plan::{GeneratePlan, Plan};
use host::error::Kind;
use host::worker::{self, StopFlag, WorkerEnv};
use host::{Error, Result};
use host_rank::{generate, logits, preview, script};

fn main() -> ExitCode {
    if let Err(error) = WorkerEnv::die_with_launcher() {
        return fail(&error);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["--template", parent] = arguments[..] {
        return match script::isolate::serve(parent) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        };
    }
    let env = match WorkerEnv::read() {
        Ok(env) => env,
        Err(error) => return fail(&error),
    };
    env.install_panic_hook();
    let outcome = match arguments[..] {
        ["--probe"] => probe(&env),
        ["--plan", path] => start(Path::new(path), &env),
        ["--logits", model, "--tokens", tokens, "--out", out] => {
            logits::write(Path::new(model), Path::new(tokens), Path::new(out))
        }
        _ => Err(Error::config("`host-rank` is started by `host run`").hint("see `host run --help`")),
    };
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    let reported = if error.kind == Kind::Peer { env.report_secondary(&error) } else { env.report(&error) };
    // A launcher prints the report; without one, or when it cannot be written, this is the only place that can.
    match (&env.report, reported) {
        (Some(_), Ok(())) => ExitCode::from(error.exit_code()),
        _ => fail(&error),
    }
}

fn fail(error: &Error) -> ExitCode {
    // There is nowhere left to say that stderr is closed.
    let _ = writeln!(std::io::stderr(), "{error}");
    ExitCode::from(error.exit_code())
}

fn probe(env: &WorkerEnv) -> Result<()> {
    let probe = host_rank::device::probe(&env.libtorch_lib)?;
    let text = serde_json::to_string(&probe)
        .map_err(|error| Error::bug("the probe is not JSON").cause(error).hint(Error::REPORT))?;
    writeln!(std::io::stdout(), "{text}").map_err(|error| Error::run("cannot write to standard output").cause(error))
}

fn start(plan: &Path, env: &WorkerEnv) -> Result<()> {
    let stop = worker::install_signals()?;
    const HINT: &str = "`host run` writes the plan for its workers: start it instead, with the `host` of this build";
    let text = std::fs::read_to_string(plan)
        .map_err(|error| Error::run(format!("cannot read the plan `{}`", plan.display())).cause(error).hint(HINT))?;
    let plan: Plan = serde_json::from_str(&text).map_err(|error| {
        Error::run(format!("the plan `{}` is not one of this version", plan.display())).cause(error).hint(HINT)
    })?;
    // Guests recurse on their own stack budget; libtorch wants a deep one too.
    script::on_big_stack(|| match plan {
        Plan::Train(plan) => {
            logging(&plan.metrics.log_level, env);
            script::train(*plan, env, stop)
        }
        Plan::Generate(plan) => generate(&plan, env, &stop),
        Plan::Preview(plan) => {
            logging("INFO", env);
            preview::run(&plan)
        }
        Plan::Check(plan) => script::check(&plan),
        Plan::Test(plan) => {
            logging("WARN", env);
            script::test(&plan, env, stop)
        }
    })?
}

fn generate(plan: &GeneratePlan, env: &WorkerEnv, stop: &StopFlag) -> Result<()> {
    logging("INFO", env);
    let template = plan.tokenizer.prompt_template.as_ref();
    let template = template.map(|guest| script::open_template(guest, &plan.limits)).transpose()?;
    generate::run(plan, env, template.as_ref(), stop)
}

/// Logs go to stderr; the launcher labels the lines of ranks other than 0.
fn logging(level: &str, env: &WorkerEnv) {
    let level = level.parse().unwrap_or(tracing::Level::INFO);
    let directives = format!("host={level},host_rank={level},guest={level}");
    let filter = tracing_subscriber::EnvFilter::try_from_env("HOST_LOG").unwrap_or_else(|_| directives.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .without_time()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // It would panic where stderr is closed.
        .log_internal_errors(false)
        .init();
    tracing::debug!("rank {} of {}", env.rank, env.world_size);
}
