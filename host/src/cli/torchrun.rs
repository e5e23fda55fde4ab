//! torchrun's flags, every one: what it means here, that it changes nothing here, or why it cannot be obeyed.

use std::path::PathBuf;

use clap::builder::{Str, ValueParser};
use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::config::plan::{DevicePlan, Plan};
use crate::error::{Error, Result};
use crate::launch::{LaunchOptions, Logs, Streams};
use crate::{doctor, machine};

const HEADING: &str = "Flags of torchrun";

/// The flags that decide something.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Workers to start on this machine: a number, `gpu`, `cpu` (one each), or `auto` (GPUs, else CPUs)
    #[arg(long, aliases = ["nproc_per_node", "nproc-per-node"], value_name = "N", default_value = "1",
        value_parser = Nproc::parse)]
    nproc: Nproc,

    /// Where the workers meet
    #[arg(long, alias = "master_addr", value_name = "HOST")]
    master_addr: Option<String>,

    /// The port where the workers meet; any free one by default
    #[arg(long, alias = "master_port", value_name = "PORT")]
    master_port: Option<u16>,

    /// Writes what each worker prints to `DIR/rank_N/stdout.log` and `stderr.log` too
    #[arg(long, alias = "log_dir", value_name = "DIR", help_heading = HEADING)]
    log_dir: Option<PathBuf>,

    /// What goes to the files of `--log-dir` alone: 1 stdout, 2 stderr, 3 both; `0:3,1:2` by worker
    #[arg(long, short, value_name = "STREAMS", requires = "log_dir", help_heading = HEADING)]
    redirects: Option<Streams>,

    /// What goes to the files of `--log-dir` and to the terminal
    #[arg(long, short, value_name = "STREAMS", requires = "log_dir", help_heading = HEADING)]
    tee: Option<Streams>,

    /// Shows only these workers' output, such as `0,2`
    #[arg(long, alias = "local_ranks_filter", value_name = "RANKS", value_delimiter = ',', help_heading = HEADING)]
    local_ranks_filter: Vec<usize>,

    #[command(flatten)]
    others: Others,
}

/// How many workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nproc {
    Count(u16),
    Auto,
    Cpu,
    Gpu,
}

impl Nproc {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "gpu" => Ok(Self::Gpu),
            _ => match text.parse() {
                Ok(count @ 1..=1024) => Ok(Self::Count(count)),
                _ => Err("a number from 1 to 1024, `auto`, `cpu` or `gpu` is needed".to_owned()),
            },
        }
    }
}

impl Args {
    /// How many workers there will be for `plan`. Looks for GPUs where it has to.
    pub fn nproc(&self, plan: &Plan) -> Result<usize> {
        let device = match plan {
            Plan::Train(plan) => plan.device,
            Plan::Generate(plan) => plan.device,
            Plan::Preview(_) | Plan::Check(_) | Plan::Test(_) => DevicePlan::Cpu,
        };
        let gpus = || match device {
            // A run on the CPU has no use for them.
            DevicePlan::Cpu => Ok(0),
            DevicePlan::Cuda => doctor::num_gpus(),
        };
        match self.nproc {
            Nproc::Count(count) => Ok(count.into()),
            Nproc::Cpu => Ok(machine::usable_cores()),
            Nproc::Auto => Ok(Some(gpus()?).filter(|count| *count > 0).unwrap_or_else(machine::usable_cores)),
            Nproc::Gpu => match gpus()? {
                0 => Err(Error::config("`--nproc gpu`: there is no GPU for this run")
                    .hint("`host doctor` says what is found; `device: cpu` in the config leaves GPUs alone")),
                count => Ok(count),
            },
        }
    }

    pub fn options(&self) -> Result<LaunchOptions> {
        let (mut master_addr, mut master_port) = (self.master_addr.clone(), self.master_port);
        if let Some(endpoint) = self.others.text("rdzv-endpoint").filter(|_| !self.others.is_set("standalone")) {
            let (addr, port) = endpoint.rsplit_once(':').unwrap_or((endpoint, "0"));
            let port: u16 = port.parse().map_err(|_| {
                Error::config(format!("`--rdzv-endpoint {endpoint}` is not HOST or HOST:PORT"))
                    .hint("`localhost:29500`")
            })?;
            master_addr.get_or_insert_with(|| addr.to_owned());
            master_port.get_or_insert(port);
        }
        let logs = Logs {
            dir: self.log_dir.clone(),
            redirects: self.redirects.clone().unwrap_or_default(),
            tee: match (&self.redirects, &self.tee) {
                (None, None) if self.log_dir.is_some() => Streams::ALL,
                (_, tee) => tee.clone().unwrap_or_default(),
            },
            shown: self.local_ranks_filter.clone(),
        };
        Ok(LaunchOptions { master_addr, master_port, logs })
    }

    /// What to know about flags that change nothing; an error for those that cannot be obeyed.
    pub fn notices(&self) -> Result<Vec<String>> {
        let mut notices = vec![];
        let mut errors = vec![];
        for (flag, value) in &self.others.given {
            let shown =
                format!("`--{}{}`", flag.name, value.as_ref().map_or(String::new(), |value| format!(" {value}")));
            match flag.class {
                Class::Read => {}
                Class::Satisfied(why) => notices.push(format!("{shown} changes nothing here: {why}")),
                Class::Fixed { values, why } if !value.as_deref().is_some_and(|value| values.contains(&value)) => {
                    errors.push(Error::config(format!("{shown} cannot be obeyed: {why}")).hint("leave it out"));
                }
                Class::Fixed { .. } => {}
            }
        }
        Error::all(errors).map_or(Ok(notices), Err)
    }
}

/// What becomes of a flag.
#[derive(Clone, Copy, Debug)]
enum Class {
    /// Read above.
    Read,
    Satisfied(&'static str),
    /// These values are what we do; any other is refused.
    Fixed {
        values: &'static [&'static str],
        why: &'static str,
    },
}

#[derive(Debug)]
struct Flag {
    name: &'static str,
    short: Option<char>,
    takes_value: bool,
    class: Class,
}

const fn flag(name: &'static str, takes_value: bool, class: Class) -> Flag {
    Flag { name, short: None, takes_value, class }
}

const fn refused(name: &'static str, takes_value: bool, why: &'static str) -> Flag {
    flag(name, takes_value, Class::Fixed { values: &[], why })
}

const ONE_MACHINE: &str = "a run is on one machine so far";
const NO_PYTHON: &str = "a recipe is a .wasm or .rhai file, not Python";
const NO_FILTERS: &str = "the workers' output is not filtered; `grep` the files of `--log-dir`";

const FLAGS: &[Flag] = &[
    flag("rdzv-endpoint", true, Class::Read),
    flag("standalone", false, Class::Read),
    flag("nnodes", true, Class::Fixed { values: &["1", "1:1"], why: ONE_MACHINE }),
    flag("node-rank", true, Class::Fixed { values: &["0"], why: ONE_MACHINE }),
    flag(
        "max-restarts",
        true,
        Class::Fixed { values: &["0"], why: "a run that failed goes on with `resume_from_checkpoint=True`" },
    ),
    flag("rdzv-backend", true, Class::Satisfied("workers of one machine meet at the first one's port")),
    flag("rdzv-id", true, Class::Satisfied("each run has a port of its own")),
    flag("rdzv-conf", true, Class::Satisfied("workers of one machine meet at the first one's port")),
    flag("local-addr", true, Class::Satisfied("workers of one machine meet at the first one's port")),
    flag("monitor-interval", true, Class::Satisfied("a worker's end is seen at once")),
    flag("start-method", true, Class::Satisfied("a worker is a process")),
    flag("role", true, Class::Satisfied("all workers have the same role")),
    flag("event-log-handler", true, Class::Satisfied("the end of a run is told on the terminal")),
    flag("signals-to-handle", true, Class::Satisfied("SIGINT and SIGTERM reach every worker")),
    refused("numa-binding", true, "workers are not bound to CPUs; `numactl` does it for all of them"),
    refused("virtual-local-rank", false, "each worker takes the GPU of its local rank"),
    refused("duplicate-stdout-filters", true, NO_FILTERS),
    refused("duplicate-stderr-filters", true, NO_FILTERS),
    refused("logs-specs", true, "`--log-dir`, `--redirects` and `--tee` say where output goes"),
    Flag { short: Some('m'), ..refused("module", false, NO_PYTHON) },
    refused("no-python", false, NO_PYTHON),
    refused("run-path", false, NO_PYTHON),
];

/// The rest of torchrun's flags, as far as they were given.
#[derive(Debug)]
struct Others {
    given: Vec<(&'static Flag, Option<String>)>,
}

impl Others {
    fn is_set(&self, name: &str) -> bool {
        self.given.iter().any(|(flag, _)| flag.name == name)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.given.iter().find(|(flag, _)| flag.name == name).and_then(|(_, value)| value.as_deref())
    }
}

impl clap::Args for Others {
    fn augment_args(command: Command) -> Command {
        FLAGS.iter().fold(command, |command, flag| {
            let underscored: Str = flag.name.replace('-', "_").into();
            let help = match flag.class {
                Class::Read if flag.takes_value => "Where the workers meet, as HOST:PORT".to_owned(),
                Class::Read => "Ignores `--rdzv-endpoint`".to_owned(),
                Class::Satisfied(why) => format!("Changes nothing: {why}"),
                Class::Fixed { values: [], why } => format!("Refused: {why}"),
                Class::Fixed { values: [first, ..], why } => format!("Only {first}: {why}"),
            };
            let mut arg = Arg::new(flag.name).long(flag.name).help(help).help_heading(HEADING).hide_short_help(true);
            if underscored.as_str() != flag.name {
                arg = arg.alias(underscored);
            }
            if let Some(short) = flag.short {
                arg = arg.short(short);
            }
            command.arg(if flag.takes_value {
                arg.action(ArgAction::Set).value_name("VALUE").value_parser(ValueParser::string())
            } else {
                arg.action(ArgAction::SetTrue)
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Others {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let given = |flag: &'static Flag| match flag.takes_value {
            true => matches.get_one::<String>(flag.name).map(|value| (flag, Some(value.clone()))),
            false => matches.get_flag(flag.name).then_some((flag, None)),
        };
        Ok(Self { given: FLAGS.iter().filter_map(given).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
