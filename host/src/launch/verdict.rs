//! Turns the ends of all ranks into the one result of the run.
//!
//! One rank's failure makes the others fail too, within milliseconds and with more noise. The rule here decides whose
//! error a person reads: the rank that failed by itself, and first.

use std::os::unix::process::ExitStatusExt;

use rustix::process::Signal;
use signal_hook::low_level::signal_name;

use super::ranks::{Ended, Late};
use crate::error::{Error, Kind, Result};

/// The result of all ranks of this launcher.
pub(super) fn of(mut ended: Vec<Ended>, asked_to_stop: bool) -> Result<()> {
    ended.sort_by_key(|ended| ended.rank);
    let failed: Vec<&Ended> = ended.iter().filter(|ended| failed_by_itself(ended, asked_to_stop)).collect();
    if let Some(first) = failed.iter().min_by_key(|ended| precedence(ended)) {
        let error = without_rank(error_of(first));
        // Which of those that made the same mistake came first is chance: the lowest is named, and none where all did.
        let alike: Vec<usize> =
            failed.iter().filter(|other| without_rank(error_of(other)) == error).map(|other| other.rank).collect();
        let rank = if alike.len() == ended.len() { None } else { alike.first().copied() };
        return Err(Error { rank, ..error });
    }
    if ended.iter().all(|ended| ended.status.is_some_and(|status| status.success())) {
        return Ok(());
    }
    Err(interruption(&ended))
}

/// Neither done, nor stopped on request, nor ended by a signal that we, or a terminal with us, sent.
fn failed_by_itself(ended: &Ended, asked_to_stop: bool) -> bool {
    if ended.late.is_some() {
        return !ended.by_agreement();
    }
    let Some(status) = ended.status else { return ended.sent.is_empty() };
    match (status.code(), status.signal().and_then(Signal::from_named_raw)) {
        (Some(0 | 130), _) => false,
        (None, Some(Signal::INT | Signal::TERM)) if asked_to_stop => false,
        (None, Some(signal)) => !ended.sent.contains(&signal),
        _ => true,
    }
}

/// Smallest is the one to name.
///
/// A SIGKILL we did not send is never a consequence. A rank that says it only lost another is one always. Between ranks
/// of the same poll a crash comes before a report: the others notice a crash at once and may report it as their own.
fn precedence(ended: &Ended) -> impl Ord + use<> {
    let signal = ended.status.and_then(|status| status.signal());
    let crashed = signal.is_some();
    // Without a report, an exit code after a signal of ours most likely answers that signal.
    let secondary = ended.report.as_ref().map_or(!crashed && !ended.sent.is_empty(), |report| report.secondary);
    let at = ended.report.as_ref().map_or(ended.at, |report| report.since_epoch);
    (signal != Some(Signal::KILL.as_raw()), secondary, ended.poll, !crashed, at, ended.rank)
}

fn without_rank(error: Error) -> Error {
    Error { rank: None, ..error }
}

/// Names no rank in the message: [`of`] adds it, where there are several.
fn error_of(ended: &Ended) -> Error {
    if let Some(late) = ended.late {
        return late_error(late);
    }
    let Some(status) = ended.status else {
        return Error::run("the worker was lost: its process was reaped by somebody else");
    };
    if let Some(signal) = status.signal() {
        // What a rank reported before it crashed knows more than the signal: it may have crashed by its panic, or as it ended.
        return match &ended.report {
            Some(report) if signal != Signal::KILL.as_raw() => report.error.clone(),
            _ => killed(signal),
        };
    }
    if let Some(report) = &ended.report {
        return report.error.clone();
    }
    let code = status.code().unwrap_or_default();
    let error = Error::run(format!("the worker ended with exit code {code} and left no report"));
    match code {
        // The dynamic loader's own code, given before the worker's first line.
        127 => error.hint("a library may be missing or not fit; `host doctor` checks libtorch and the worker"),
        _ => error.hint("its last lines above say more"),
    }
}

fn late_error(Late { by, state }: Late) -> Error {
    let state = match state {
        Some('T' | 't') => "stopped, as SIGSTOP does",
        Some('D') => "waiting for a disk or a device",
        Some('R') => "running",
        _ => "asleep",
    };
    Error::run(format!("the worker had not ended {} s after others had", by.as_secs_f64()))
        .cause(format!("its process was {state}"))
        .hint("what the run has saved is whole: ranks end only once it is")
        .hint("`collective_timeout_seconds` is how long ranks wait for each other")
}

fn killed(signal: i32) -> Error {
    let name = signal_name(signal).map(|name| format!(" ({name})")).unwrap_or_default();
    let message = format!("the worker was killed by signal {signal}{name}");
    match Signal::from_named_raw(signal) {
        Some(Signal::KILL) => Error::run(message)
            .cause("nobody here sent it; the kernel does when memory runs out (`dmesg` then shows `Out of memory`)")
            .hint("use less memory: a smaller `batch_size`, a smaller `tokenizer.max_seq_len`, or fewer ranks"),
        Some(Signal::BUS) => Error::run(message)
            .hint("a file was cut short while it was mapped, or shared memory is full: see `df /dev/shm`"),
        Some(Signal::ILL) => {
            Error::bug(message).hint("this CPU may lack an instruction; `host doctor` lists what it has")
        }
        Some(Signal::SEGV | Signal::ABORT | Signal::FPE) => Error::bug(message)
            .hint("this is a defect of `host`, libtorch or a driver: please report it with the config"),
        _ => Error::run(message),
    }
}

/// The most telling account of a stop: that of the lowest rank that left one, else ours.
fn interruption(ended: &[Ended]) -> Error {
    let reports = ended.iter().filter_map(|ended| ended.report.as_ref());
    if let Some(own) = reports.into_iter().find(|report| report.error.kind == Kind::Interrupted) {
        // All ranks stopped; naming one of them would mislead.
        return without_rank(own.error.clone());
    }
    let clean = ended.iter().all(Ended::by_agreement);
    Error::interrupted(if clean { "stopped on request" } else { "stopped at once, without saving" })
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;
    use std::time::Duration;

    use super::*;
    use crate::worker::Report;

    const CODE_0: i32 = 0;
    const CODE_1: i32 = 1 << 8;
    const CODE_130: i32 = 130 << 8;

    fn ended(rank: usize, poll: u64, wait_status: i32) -> Ended {
        let at = Duration::from_millis(20 * poll);
        Ended {
            rank,
            status: Some(ExitStatus::from_raw(wait_status)),
            report: None,
            at,
            poll,
            sent: vec![],
            late: None,
        }
    }

    fn reported(rank: usize, poll: u64, ms: u64, message: &str, secondary: bool) -> Ended {
        let report = Report { error: Error::run(message), secondary, since_epoch: Duration::from_millis(ms) };
        Ended { report: Some(report), ..ended(rank, poll, CODE_1) }
    }

    fn sent(signals: &[Signal], ended: Ended) -> Ended {
        Ended { sent: signals.to_vec(), ..ended }
    }

    fn named(ends: Vec<Ended>) -> (Option<usize>, String) {
        let error = of(ends, false).unwrap_err();
        (error.rank, error.message)
    }

    #[test]
    fn the_earlier_report_of_one_poll_is_named() {
        let (rank, message) =
            named(vec![reported(0, 1, 12, "second", false), reported(1, 1, 11, "first", false), ended(2, 2, CODE_0)]);
        assert_eq!((rank, message.as_str()), (Some(1), "first"));
    }

    #[test]
    fn of_ranks_that_fail_alike_the_lowest_is_named_or_none() {
        let bad_row = |rank, ms| reported(rank, rank as u64 + 1, ms, "bad row", false);
        let three = vec![bad_row(2, 10), bad_row(1, 30), reported(3, 4, 40, "other", false), ended(0, 5, CODE_130)];
        assert_eq!(named(three), (Some(1), "bad row".into()));
        assert_eq!(named((0..4).map(|rank| bad_row(rank, 10)).collect()), (None, "bad row".into()));
    }

    #[test]
    fn a_consequence_is_named_only_when_nothing_else_is() {
        let lost = || reported(0, 1, 11, "lost rank 1", true);
        assert_eq!(named(vec![lost(), reported(1, 9, 180, "no space", false)]).1, "no space");
        assert_eq!(named(vec![lost(), ended(1, 9, CODE_130)]).1, "lost rank 1");
        let answer_to_us = sent(&[Signal::TERM], ended(2, 2, CODE_1));
        assert_eq!(named(vec![lost(), answer_to_us, reported(1, 9, 180, "no space", false)]).1, "no space");
    }

    #[test]
    fn a_crash_comes_before_the_reports_it_causes() {
        let crash = |poll| ended(1, poll, Signal::SEGV.as_raw());
        assert_eq!(named(vec![reported(0, 3, 60, "connection closed", false), crash(3)]).0, Some(1));
        // But a crash while ranks are being stopped is not why they were.
        assert_eq!(named(vec![reported(0, 3, 60, "no space", false), crash(5)]).0, Some(0));
        let killed = ended(1, 4, Signal::KILL.as_raw());
        assert_eq!(named(vec![reported(0, 3, 60, "connection closed", false), killed]).0, Some(1));
    }

    /// Even one that SIGKILL does not end.
    #[test]
    fn a_rank_that_stays_after_the_others_is_the_cause() {
        let late = Some(Late { by: Duration::from_secs(5), state: Some('D') });
        let stays = |status| Ended { status, late, ..sent(&[Signal::KILL], ended(1, 9, CODE_0)) };
        for status in [None, Some(ExitStatus::from_raw(Signal::KILL.as_raw()))] {
            let what = "the worker had not ended 5 s after others had";
            assert_eq!(named(vec![ended(0, 1, CODE_0), stays(status)]), (Some(1), what.into()));
        }
        assert!(of(vec![ended(0, 1, CODE_0), stays(Some(ExitStatus::from_raw(CODE_0)))], false).is_ok());
    }

    #[test]
    fn what_a_rank_reported_before_it_crashed_is_named() {
        let crashed = |signal: Signal| Ended {
            report: reported(0, 1, 11, "no word from rank 1", false).report,
            ..ended(0, 1, signal.as_raw())
        };
        assert_eq!(named(vec![crashed(Signal::SEGV), ended(1, 2, CODE_0)]).1, "no word from rank 1");
        assert!(named(vec![crashed(Signal::KILL), ended(1, 2, CODE_0)]).1.contains("killed by signal 9"));
    }

    #[test]
    fn signals_of_ours_are_nobodys_failure() {
        let ends = vec![
            sent(&[Signal::TERM], ended(0, 2, Signal::TERM.as_raw())),
            ended(1, 1, CODE_1),
            sent(&[Signal::TERM, Signal::KILL], ended(2, 9, Signal::KILL.as_raw())),
        ];
        assert_eq!(named(ends), (Some(1), "the worker ended with exit code 1 and left no report".into()));
    }

    #[test]
    fn a_stop_is_an_interruption_even_before_handlers_are_installed() {
        assert!(of(vec![ended(0, 1, CODE_0), ended(1, 2, CODE_0)], true).is_ok(), "done before the signal mattered");
        let error = of(vec![ended(0, 1, CODE_130), ended(1, 2, CODE_130)], true).unwrap_err();
        assert_eq!((error.kind, error.message.as_str()), (Kind::Interrupted, "stopped on request"));
        // A terminal's Ctrl-C can reach a worker before we have forwarded it.
        let early = || vec![ended(0, 1, Signal::INT.as_raw()), ended(1, 1, Signal::INT.as_raw())];
        assert_eq!(of(early(), true).unwrap_err().message, "stopped at once, without saving");
        assert_eq!(named(early()), (None, "the worker was killed by signal 2 (SIGINT)".into()), "nobody asked us");
    }
}
