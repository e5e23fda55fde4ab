//! torchrun's flags, every one: what it means here, that it changes nothing here, or why it cannot be obeyed.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{Str, ValueParser};
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::ui;
use crate::config::plan::{DevicePlan, Plan};
use crate::error::{Error, Result};
use crate::launch::{Endpoint, LaunchOptions, Logs, NodesOptions, Streams};
use crate::{doctor, machine};

const HEADING: &str = "Flags of torchrun";
/// torchrun's, where an endpoint names none.
const ENDPOINT_PORT: u16 = 29400;
/// torchrun's, where `--master-port` is not given.
const MASTER_PORT: u16 = 29500;

/// The flags that decide something.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Workers to start on this machine: a number, `gpu`, `cpu` (one each), or `auto` (GPUs, else CPUs)
    #[arg(long, aliases = ["nproc_per_node", "nproc-per-node"], value_name = "N", default_value = "1",
        value_parser = Nproc::parse)]
    nproc: Nproc,

    /// Where the workers of one machine meet
    #[arg(long, alias = "master_addr", value_name = "HOST")]
    master_addr: Option<String>,

    /// The port where the workers meet; any free one by default
    #[arg(long, alias = "master_port", value_name = "PORT")]
    master_port: Option<u16>,

    /// Machines of the run, each with its own `host run`
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_nnodes)]
    nnodes: usize,

    /// Which of the machines this is, from 0; ranks count on from there
    #[arg(long, alias = "node_rank", value_name = "R")]
    node_rank: Option<usize>,

    /// Where the machines meet: a name or address of node 0, and a free port there (29400 if not given)
    #[arg(long, alias = "rdzv_endpoint", value_name = "HOST:PORT")]
    rdzv_endpoint: Option<String>,

    /// A name of the run, the same on all machines, that keeps others out
    #[arg(long, alias = "rdzv_id", value_name = "ID", default_value = "none", hide_default_value = true)]
    rdzv_id: String,

    /// How long machines and ranks wait for each other to come; 300 if not given
    #[arg(long, alias = "rdzv_timeout", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    rdzv_timeout: Option<u64>,

    /// How often all ranks are started again, from the newest checkpoint, after one of them or a machine was lost
    #[arg(long, alias = "max_restarts", value_name = "K", default_value_t = 0, hide_default_value = true)]
    max_restarts: usize,

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

/// torchrun takes a range, of which we can be only one number.
fn parse_nnodes(text: &str) -> std::result::Result<usize, String> {
    let number = |text: &str| text.parse().ok().filter(|count| (1..=1024).contains(count));
    match text.split_once(':') {
        None => number(text).ok_or("a number from 1 to 1024 is needed".to_owned()),
        Some((fewest, most)) => match (number(fewest), number(most)) {
            (Some(fewest), Some(most)) if fewest == most => Ok(most),
            (Some(_), Some(_)) => Err("a run does not grow or shrink: give one number".to_owned()),
            _ => Err("a number from 1 to 1024 is needed".to_owned()),
        },
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

    /// All ranks of the run, of which `nproc` are on this machine.
    pub fn world_size(&self, nproc: usize) -> usize {
        self.nnodes * nproc
    }

    pub fn options(&self) -> Result<LaunchOptions> {
        let endpoint = self.rdzv_endpoint.as_deref().filter(|_| !self.others.is_set("standalone"));
        let endpoint = endpoint.map(parse_endpoint).transpose()?;
        let (mut master_addr, mut master_port) = (self.master_addr.clone(), self.master_port);
        let nodes = if self.nnodes > 1 {
            let endpoint = match (endpoint, master_addr.take()) {
                (Some((host, port)), _) => Endpoint { host, port: port.unwrap_or(ENDPOINT_PORT) },
                // With these alone, torchrun's machines meet there too.
                (None, Some(host)) => Endpoint { host, port: master_port.take().unwrap_or(MASTER_PORT) },
                (None, None) => {
                    return Err(Error::config(format!(
                        "`--nnodes {}` needs to know where the machines meet",
                        self.nnodes
                    ))
                    .hint("`--rdzv-endpoint HOST:PORT`: a name or address of node 0 and a free port there"));
                }
            };
            Some(NodesOptions {
                num_nodes: self.nnodes,
                node_rank: self.own_node_rank()?,
                endpoint,
                run_id: self.rdzv_id.clone(),
            })
        } else {
            self.own_node_rank()?;
            if let Some((host, port)) = endpoint {
                master_addr.get_or_insert(host);
                master_port.get_or_insert(port.unwrap_or(0));
            }
            None
        };
        let logs = Logs {
            dir: self.log_dir.clone(),
            redirects: self.redirects.clone().unwrap_or_default(),
            tee: match (&self.redirects, &self.tee) {
                (None, None) if self.log_dir.is_some() => Streams::ALL,
                (_, tee) => tee.clone().unwrap_or_default(),
            },
            shown: self.local_ranks_filter.clone(),
        };
        let rdzv_timeout = match self.rdzv_timeout {
            Some(seconds) => Some(seconds),
            None => self.others.text("rdzv-conf").map(conf_timeout).transpose()?.flatten(),
        };
        Ok(LaunchOptions {
            nodes,
            master_addr,
            master_port,
            max_restarts: self.max_restarts,
            rdzv_timeout: rdzv_timeout.map(Duration::from_secs),
            logs,
            say: Some(ui::say),
        })
    }

    fn own_node_rank(&self) -> Result<usize> {
        match (self.node_rank, self.nnodes) {
            (Some(rank), count) if rank < count => Ok(rank),
            (Some(rank), 1) if rank > 0 => Err(Error::config(format!("`--node-rank {rank}` of one machine"))
                .hint("`--nnodes` says how many there are")),
            (Some(rank), count) => Err(Error::config(format!("there is no node {rank} of `--nnodes {count}`"))
                .hint(format!("`--node-rank` counts from 0 to {}", count - 1))),
            (None, 1) => Ok(0),
            (None, count) => Err(Error::config(format!("`--nnodes {count}` needs to know which of them this is"))
                .hint(format!("`--node-rank`, from 0 at the rendezvous endpoint to {}", count - 1))),
        }
    }

    /// What to know where srun starts this program several times, and nothing makes one run of them. The first one says it.
    pub fn slurm_notice(&self) -> Option<String> {
        let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
        let tasks = number("SLURM_STEP_NUM_TASKS").filter(|tasks| *tasks > 1)?;
        let is_joined = self.nnodes > 1 || std::env::var_os("RANK").is_some();
        (!is_joined && number("SLURM_PROCID").unwrap_or(0) == 0).then(|| {
            format!(
                "srun starts this command {tasks} times, each a run of its own, and all write to one `output_dir`; for one run start \
                 it once a node (`--ntasks-per-node=1`) with `--nnodes \"$SLURM_NNODES\" --node-rank \"$SLURM_NODEID\" \
                 --rdzv-endpoint FIRST_NODE:29500`, as examples/slurm does"
            )
        })
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

/// `HOST` or `HOST:PORT`; an IPv6 address stands in brackets.
fn parse_endpoint(text: &str) -> Result<(String, Option<u16>)> {
    let wrong =
        || Error::config(format!("`--rdzv-endpoint {text}` is not HOST or HOST:PORT")).hint("`localhost:29500`");
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, rest)) => (host, rest.strip_prefix(':').or((!rest.is_empty()).then_some(rest))),
        None => text.rsplit_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map(str::parse).transpose().map_err(|_| wrong())?;
    if host.is_empty() { Err(wrong()) } else { Ok((host.to_owned(), port)) }
}

/// The seconds in torchrun's `--rdzv-conf timeout=900,…`; c10d calls them `join_timeout`.
fn conf_timeout(text: &str) -> Result<Option<u64>> {
    let mut pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    let given = pairs.rfind(|(key, _)| ["timeout", "join_timeout"].contains(&key.trim()));
    let seconds = given.map(|(_, value)| value.trim().parse().ok().filter(|seconds| (1..=86_400).contains(seconds)));
    match seconds {
        Some(None) => {
            Err(Error::config(format!("`--rdzv-conf {text}` has no seconds")).hint("`--rdzv-conf timeout=300`"))
        }
        seconds => Ok(seconds.flatten()),
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

const NO_PYTHON: &str = "a recipe is a .wasm or .rhai file, not Python";
const NO_FILTERS: &str = "the workers' output is not filtered; `grep` the files of `--log-dir`";

const FLAGS: &[Flag] = &[
    flag("standalone", false, Class::Read),
    flag("rdzv-conf", true, Class::Read),
    flag(
        "rdzv-backend",
        true,
        Class::Fixed { values: &["c10d", "static"], why: "machines meet at node 0, and need no server besides" },
    ),
    flag("local-addr", true, Class::Satisfied("a machine is known by the address it reaches node 0 from")),
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
                Class::Read if flag.takes_value => "Of `timeout=SECONDS`: what `--rdzv-timeout` says".to_owned(),
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
