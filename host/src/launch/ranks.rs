//! The worker processes: started, watched, signalled and always reaped.
//!
//! One thread polls. A signal goes only to a process that has not been reaped, so never to a stranger with its number;
//! 20 ms of delay at the end of a run cost less than the races of one waiting thread per worker.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::logs::{Logs, Sinks, Stream};
use super::nodes::Others;
use crate::error::{Error, Result};
use crate::worker::{Report, WorkerEnv, since_epoch};

const POLL: Duration = Duration::from_millis(20);
/// From a rank's death to the SIGTERM for the others: a mistake that all make is then reported by all.
const SAME_MISTAKE: Duration = Duration::from_millis(200);
/// From the SIGTERM after a rank's death to the SIGKILL.
pub(super) const GRACE: Duration = Duration::from_secs(4);
/// From the SIGKILL to giving up on a process that the kernel does not let die.
const LAST_WAIT: Duration = Duration::from_secs(3);
/// One Ctrl-C may arrive more than once: from the terminal, and forwarded by a program that started us.
const SAME_KEYSTROKE: Duration = Duration::from_secs(1);
/// For the last lines of ended workers, which a grandchild can keep from ending.
const LAST_LINES: Duration = Duration::from_millis(500);
/// From a rank's death to the end of all, with some time to spare.
pub(super) const LONGEST_STOP: Duration = Duration::from_secs(10);

/// What somebody asks of this launcher with signals, for as long as the run lasts.
pub(super) struct Requests {
    signals: Signals,
    first: Option<Instant>,
}

/// What to do about a signal.
enum Request {
    Stop(Signal),
    Kill,
}

impl Requests {
    /// Takes over SIGINT and SIGTERM; do it before the first worker starts, so that none outlives a signal.
    pub fn listen() -> Result<Self> {
        let signals = Signals::new([SIGINT, SIGTERM])
            .map_err(|error| Error::run("cannot install a signal handler").cause(error))?;
        Ok(Self { signals, first: None })
    }

    fn arrived(&mut self) -> Vec<Request> {
        let mut requests = vec![];
        for signal in self.signals.pending() {
            match self.first {
                None => {
                    self.first = Some(Instant::now());
                    requests.push(Request::Stop(if signal == SIGINT { Signal::INT } else { Signal::TERM }));
                }
                // A scheduler repeats SIGTERM before it kills; only a person at the keyboard means "now".
                Some(first) if signal == SIGINT && first.elapsed() > SAME_KEYSTROKE => requests.push(Request::Kill),
                Some(_) => {}
            }
        }
        requests
    }

    /// Whether somebody asked for a stop; for times at which no worker runs.
    pub fn asked(&mut self) -> bool {
        self.arrived();
        self.first.is_some()
    }
}

/// How one rank ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub rank: usize,
    /// `None`: still there after SIGKILL, or reaped by somebody else.
    pub status: Option<ExitStatus>,
    pub report: Option<Report>,
    /// Since the epoch, to be compared with a report's time.
    pub at: Duration,
    /// Which poll saw it; ranks of one poll ended at the same time as far as we know.
    pub poll: u64,
    /// The signals we sent before it ended.
    pub sent: Vec<Signal>,
    pub late: Option<Late>,
}

/// A rank that was still there so long after another had come to the end that all come to together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Late {
    pub by: Duration,
    /// What its process was doing then, as `/proc` spells it.
    pub state: Option<char>,
}

impl Ended {
    /// 0 and 130 are ends that all ranks come to together, some later than others.
    pub fn by_agreement(&self) -> bool {
        self.status.is_some_and(is_agreed)
    }
}

fn is_agreed(status: ExitStatus) -> bool {
    matches!(status.code(), Some(0 | 130))
}

struct Worker {
    rank: usize,
    child: Child,
    report_path: Option<PathBuf>,
    sent: Vec<Signal>,
    late: Option<Late>,
}

impl Worker {
    fn send(&mut self, signal: Signal) {
        self.sent.push(signal);
        // Fails only for a process that has just ended; the next poll sees it.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    fn ended(self, status: Option<ExitStatus>, poll: u64) -> Ended {
        let report = self.report_path.as_deref().and_then(Report::read);
        Ended { rank: self.rank, status, report, at: since_epoch(), poll, sent: self.sent, late: self.late }
    }
}

/// Where the output of one worker goes.
pub(super) struct Outputs {
    out: Sinks,
    err: Sinks,
    /// The first worker keeps our terminal, for its progress bar; the others' lines get a label.
    has_terminal: bool,
}

impl Outputs {
    pub fn open(logs: &Logs, env: &WorkerEnv, is_first: bool) -> Result<Self> {
        let sinks = |stream| logs.sinks(env.rank, env.local_rank, stream);
        Ok(Self { out: sinks(Stream::Out)?, err: sinks(Stream::Err)?, has_terminal: is_first })
    }

    fn stdio(&self, sinks: &Sinks) -> Stdio {
        match sinks {
            sinks if sinks.is_plain() && self.has_terminal => Stdio::inherit(),
            Sinks { is_shown: false, file: None } => Stdio::null(),
            _ => Stdio::piped(),
        }
    }
}

/// All workers of this launcher. Dropping it kills those that are left.
pub(super) struct Ranks {
    running: Vec<Worker>,
    ended: Vec<Ended>,
    forwarders: Vec<JoinHandle<()>>,
    polls: u64,
    stop_at: Option<Instant>,
    kill_at: Option<Instant>,
    /// When the first rank, of any node, came to the end that all come to together.
    first_end: Option<Instant>,
}

impl Ranks {
    pub fn new() -> Self {
        Self {
            running: vec![],
            ended: vec![],
            forwarders: vec![],
            polls: 0,
            stop_at: None,
            kill_at: None,
            first_end: None,
        }
    }

    /// Starts one worker.
    pub fn start(&mut self, env: &WorkerEnv, command: &mut Command, outputs: Outputs) -> std::io::Result<()> {
        command.stdin(Stdio::null()).stdout(outputs.stdio(&outputs.out)).stderr(outputs.stdio(&outputs.err));
        let mut child = command.spawn()?;
        let rank = env.rank;
        if let Some(from) = child.stdout.take() {
            let forward = move || forward_lines(rank, from, outputs.out, || std::io::stdout().lock());
            self.forwarders.push(std::thread::spawn(forward));
        }
        if let Some(from) = child.stderr.take() {
            let forward = move || forward_lines(rank, from, outputs.err, || std::io::stderr().lock());
            self.forwarders.push(std::thread::spawn(forward));
        }
        self.running.push(Worker { rank, child, report_path: env.report.clone(), sent: vec![], late: None });
        Ok(())
    }

    /// Waits until every worker has ended. `patience` is for those that stay when others have ended, `others` tells of the
    /// ranks of other nodes.
    pub fn wait(
        mut self,
        requests: &mut Requests,
        patience: Option<Duration>,
        mut others: impl FnMut() -> Others,
    ) -> Vec<Ended> {
        while !self.running.is_empty() {
            self.pass_on(requests);
            self.reap();
            let others = others();
            if self.kill_at.is_none() && others == Others::Failed {
                self.stop_soon();
            }
            if let Some(patience) = patience {
                self.end_late(patience, others == Others::Ended);
            }
            if !self.end_by_deadline() {
                break;
            }
            if !self.running.is_empty() {
                std::thread::sleep(POLL);
            }
        }
        self.finish_lines();
        // A terminal's signal may have ended the workers before we heard of it.
        self.pass_on(requests);
        std::mem::take(&mut self.ended)
    }

    fn pass_on(&mut self, requests: &mut Requests) {
        for request in requests.arrived() {
            match request {
                Request::Stop(signal) => self.send_all(signal),
                Request::Kill => {
                    self.send_all(Signal::KILL);
                    self.kill_at.get_or_insert(Instant::now());
                }
            }
        }
    }

    fn stop_soon(&mut self) {
        let stop_at = Instant::now() + SAME_MISTAKE;
        (self.stop_at, self.kill_at) = (Some(stop_at), Some(stop_at + GRACE));
    }

    /// Ends those that stay when others have ended. Ranks end once the last checkpoint is written and all have said so: who
    /// is left has nothing to do any more, and nobody waits for it but we.
    fn end_late(&mut self, patience: Duration, others_ended: bool) {
        if others_ended || self.ended.iter().any(Ended::by_agreement) {
            self.first_end.get_or_insert(Instant::now());
        }
        if self.kill_at.is_none() && self.first_end.is_some_and(|first| first.elapsed() > patience) {
            for worker in &mut self.running {
                worker.late = Some(Late { by: patience, state: state_of(worker.child.id()) });
            }
            self.kill_at = Some(Instant::now());
        }
    }

    fn reap(&mut self) {
        self.polls += 1;
        let mut lost_one = false;
        for mut worker in std::mem::take(&mut self.running) {
            match worker.child.try_wait() {
                Ok(None) => self.running.push(worker),
                Ok(Some(status)) => {
                    lost_one |= !is_agreed(status);
                    self.ended.push(worker.ended(Some(status), self.polls));
                }
                // Only a child that somebody else reaped cannot be waited for.
                Err(_) => {
                    lost_one = true;
                    self.ended.push(worker.ended(None, self.polls));
                }
            }
        }
        if lost_one && self.kill_at.is_none() {
            self.stop_soon();
        }
    }

    /// Stops, then kills who is left when the time is up. Returns false once even that has not helped.
    fn end_by_deadline(&mut self) -> bool {
        if self.stop_at.take_if(|stop_at| Instant::now() >= *stop_at).is_some() {
            self.send_all(Signal::TERM);
        }
        let Some(kill_at) = self.kill_at else { return true };
        let late = Instant::now().saturating_duration_since(kill_at);
        if late > LAST_WAIT {
            let lost = std::mem::take(&mut self.running);
            self.ended.extend(lost.into_iter().map(|worker| worker.ended(None, self.polls)));
            return false;
        }
        if Instant::now() >= kill_at && self.running.iter().any(|worker| !worker.sent.contains(&Signal::KILL)) {
            self.send_all(Signal::KILL);
        }
        true
    }

    fn send_all(&mut self, signal: Signal) {
        self.running.iter_mut().for_each(|worker| worker.send(signal));
    }

    fn finish_lines(&mut self) {
        let start = Instant::now();
        while start.elapsed() < LAST_LINES && self.forwarders.iter().any(|thread| !thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.send_all(Signal::KILL);
        let start = Instant::now();
        while start.elapsed() < LAST_WAIT && !self.running.is_empty() {
            self.running.retain_mut(|worker| matches!(worker.child.try_wait(), Ok(None)));
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The letter that stands for the state of a process.
fn state_of(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // It follows the program's name, which stands in brackets and may hold some.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Copies lines with the rank's label, each in one write, so that lines of several ranks do not mix.
fn forward_lines<W: Write>(rank: usize, from: impl Read, sinks: Sinks, to: impl Fn() -> W) {
    let mut from = BufReader::new(from);
    let Sinks { is_shown, mut file } = sinks;
    let label = format!("[rank {rank}] ").into_bytes();
    loop {
        let mut line = label.clone();
        match from.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        // Where our own output is closed, or the disk full, there is nobody to tell; the worker must not block for that.
        if let Some(file) = &mut file {
            let _ = file.write_all(&line[label.len()..]);
        }
        if is_shown {
            let mut to = to();
            let _ = to.write_all(&line).and_then(|()| to.flush());
        }
    }
}
