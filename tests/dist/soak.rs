//! What `ends`, `faults` and `nodes` do once, done at random for as long as one likes: `cargo xtask soak --minutes 10 --seed 1`.
//!
//! Every run is one of a few undisturbed ones, so each loss it logs is known beforehand, whatever was done to it.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::case::{Case, Ended, RHAI, Running, WASM, lives, workers_of, workers_with};
use crate::{faults, nodes};

/// Two epochs of 80 steps on one rank, of 40 on two.
const RUN: &[&str] = &[
    "dataset.split=train[:80]",
    "batch_size=1",
    "gradient_accumulation_steps=1",
    "epochs=2",
    "run_val_every_n_steps=25",
];
/// How a run that was harmed goes on: by itself, as often as a run is harmed at most.
const RESTARTS: usize = 4;
/// A rank that waits for another gives up after so many seconds, which are more than it may stand still on a busy machine.
const TIMEOUT: u64 = 10;
/// For nodes that lost each other to meet again.
const REUNION: u64 = 60;
/// Starts of a run that is harmed before it is left alone.
const MOST_HARM: usize = 4;
const RESUME: &str = "resume_from_checkpoint=True";
/// How much more memory the second half of a run may need than the first: nothing but noise.
const GROWTH: f64 = 1.03;

#[test]
#[ignore = "takes as long as one likes: `cargo xtask soak`"]
fn soak() {
    let setting = |name: &str, default: f64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let time = Duration::from_secs_f64(60.0 * setting("HOST_SOAK_MINUTES", 1.0));
    let seed = setting("HOST_SOAK_SEED", 1.0) as u64;
    println!("seed {seed}");
    let (mut dice, mut counts) = (Dice(seed), BTreeMap::new());
    let case = Case::new();
    let undisturbed = [1, 2].map(|ranks| Undisturbed::run(&case, ranks));
    let faults = setting("HOST_SOAK_FAULTS", 50.0) as usize;
    harm_many(faults, FAULTS, &case, &undisturbed[1], &mut dice, &mut counts);
    println!("{faults} faults: {counts:?}");
    let started = Instant::now();
    while started.elapsed() < time {
        let run = dice.pick(&undisturbed);
        soak_one_run(&case, run, &|_, dice| Some(*dice.pick(ALL_HARM)), &mut dice, &mut counts);
        std::fs::remove_dir_all(case.path("out")).unwrap();
    }
    println!("{:.1} minutes:", started.elapsed().as_secs_f64() / 60.0);
    counts.iter().for_each(|(what, count)| println!("  {what}: {count}"));
}

/// Killed, frozen, out of disk, cut off: whichever rank, at whatever moment.
#[test]
fn five_faults() {
    let case = Case::new();
    let undisturbed = Undisturbed::run(&case, 2);
    let mut counts = BTreeMap::new();
    harm_many(5, FAULTS, &case, &undisturbed, &mut Dice(5), &mut counts);
    println!("{counts:?}");
}

/// Harms runs until so many have been, in each of these ways at least once.
fn harm_many(faults: usize, hows: &[How], case: &Case, run: &Undisturbed, dice: &mut Dice, counts: &mut Counts) {
    let done = |counts: &Counts| hows.iter().filter_map(|how| counts.get(how.done())).sum::<usize>();
    let draw = |counts: &Counts, dice: &mut Dice| {
        let is_missing = |how: &How| [how.done(), how.skipped()].iter().all(|what| counts.get(what) < Some(&1));
        let missing: Vec<How> = hows.iter().copied().filter(is_missing).collect();
        (done(counts) < faults).then(|| *dice.pick(if missing.is_empty() { hows } else { &missing }))
    };
    while done(counts) < faults {
        soak_one_run(case, run, &draw, dice, counts);
        std::fs::remove_dir_all(case.path("out")).unwrap();
    }
}

/// The smallest soak: 20 kills of whichever process, at whatever moment; and the inputs stay as they are.
#[test]
fn twenty_kills() {
    let (mut dice, mut counts) = (Dice(20), BTreeMap::new());
    let case = Case::new();
    let inputs = || ["model", "data"].map(|folder| case.contents(folder));
    let before = inputs();
    let undisturbed = Undisturbed::run(&case, 2);
    harm_many(20, &[How::KillRank, How::KillLauncher], &case, &undisturbed, &mut dice, &mut counts);
    println!("{counts:?}");
    assert!(inputs() == before, "an input has changed");
}

type Counts = BTreeMap<&'static str, usize>;

fn count(counts: &mut Counts, what: &'static str, more: usize) {
    *counts.entry(what).or_default() += more;
}

struct Dice(u64);

impl Dice {
    /// A number below `end`, by SplitMix64.
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }

    fn pick<'a, T>(&mut self, things: &'a [T]) -> &'a T {
        &things[self.below(things.len())]
    }
}

/// What a run comes to when nobody disturbs it.
struct Undisturbed {
    ranks: usize,
    losses: Vec<f64>,
    adapter: Vec<u8>,
    took: Duration,
    checkpoint_kib: usize,
}

impl Undisturbed {
    fn run(case: &Case, ranks: usize) -> Self {
        let dir = format!("undisturbed_{ranks}");
        let started = Instant::now();
        let own = [format!("--nproc={ranks}"), format!("output_dir={dir}")];
        let settings = [RUN, &own.each_ref().map(String::as_str)].concat();
        let ended = Ended::of(case.run(WASM, &settings).env("OMP_NUM_THREADS", "1"));
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        let losses = case.log(&dir);
        assert_eq!(losses.len(), 160 / ranks);
        let took = started.elapsed();
        // Validated, saved and begun a second epoch at the half, it has needed all the memory it ever should.
        let lines = lines(case, &dir);
        let peaks: Vec<f64> = lines.iter().filter_map(|line| line["peak_rss_mb"].as_f64()).collect();
        let (half, end) = (peaks[peaks.len() / 2 + 5], peaks[peaks.len() - 1]);
        println!("{ranks} ranks: {took:.1?}, {half:.0} MB at the half, {end:.0} MB at the end");
        assert!(end < GROWTH * half, "memory grows: {peaks:?}");
        let checkpoint_kib = case.size(&format!("{dir}/epoch_1")) as usize / 1024;
        Self { ranks, losses, adapter: adapter(case, &dir), took, checkpoint_kib }
    }

    /// A run that takes longer hangs, however busy the machine is: each start may wait for its ranks to meet, for one of
    /// them in a step, and for them to be stopped.
    fn longest(&self) -> Duration {
        10 * self.took + Duration::from_secs(4 * (1 + RESTARTS as u64) * (REUNION + TIMEOUT))
    }
}

fn lines(case: &Case, dir: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(case.path(dir).join("logs/log.jsonl")).unwrap_or_default();
    // A disk that fills cuts the last one.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

fn adapter(case: &Case, dir: &str) -> Vec<u8> {
    std::fs::read(case.path(dir).join("epoch_1/adapter/adapter_model.safetensors")).unwrap()
}

/// What is to be done next to a run, if anything.
type Draw<'a> = &'a dyn Fn(&Counts, &mut Dice) -> Option<How>;

/// Starts a run and harms it; goes on with it, where it has not done so by itself, and so on to its end; then goes on once
/// more from the middle.
fn soak_one_run(case: &Case, expected: &Undisturbed, draw: Draw, dice: &mut Dice, counts: &mut Counts) {
    let recipe = *dice.pick(&[WASM, RHAI]);
    let every = format!("save_every_n_steps={}", dice.pick(&[3, 7, 20, 50]));
    let choices: [&[&str]; 2] = [&[], &["checkpointer.keep_last_n_checkpoints=1"]];
    let keep = *dice.pick(&choices);
    let adapter_only = *dice.pick(&["save_adapter_weights_only=True", "save_adapter_weights_only=False"]);
    let timeout = format!("collective_timeout_seconds={TIMEOUT}");
    let settings = [RUN, &[&every, adapter_only, &timeout], keep].concat();
    println!("{recipe}, {} ranks, {}", expected.ranks, settings[RUN.len()..].join(" "));
    count(counts, "runs", 1);

    let mut loaded = BTreeMap::new();
    let mut disturb = |extra: &[&str], draw: Draw, dice: &mut Dice, counts: &mut Counts| {
        let logged = lines(case, "out").len();
        let before = whole(case);
        let ended =
            Attempt { case, recipe, settings: &[&settings[..], extra].concat(), expected }.run(draw, dice, counts);
        assert!(!ended.stderr.contains("is a bug") && !ended.stderr.contains("panicked"), "{}", ended.stderr);
        assert_eq!(workers_with(case), [], "a worker is left");
        check_resumed(&ended, &before);
        let restarts = restarts(&ended.stderr).count();
        check_losses(&lines(case, "out")[logged..], restarts, expected, counts);
        check_folders(case, &mut loaded, counts);
        count(counts, "restarted", restarts);
        ended.code == 0
    };
    let mut disturbed = 0;
    let complete = loop {
        let resume: &[&str] = if whole(case).is_empty() { &[] } else { &[RESUME] };
        count(counts, if resume.is_empty() { "begun" } else { "resumed" }, 1);
        let left_alone = disturbed == MOST_HARM;
        disturbed += 1;
        if disturb(resume, if left_alone { &|_, _| None } else { draw }, dice, counts) || left_alone {
            break whole(case).contains(&"epoch_1".to_owned());
        }
    };
    assert!(complete, "the undisturbed rest did not end the run");
    assert_eq!(adapter(case, "out"), expected.adapter, "another adapter");
    // From any checkpoint, not only the newest; there may be none left but the end.
    let steps: Vec<_> = whole(case).into_iter().filter(|name| name != "epoch_1").collect();
    if !steps.is_empty() {
        count(counts, "resumed", 1);
        let from = format!("resume_from=out/{}", dice.pick(&steps));
        assert!(disturb(&[RESUME, &from], &|_, _| None, dice, counts));
        assert_eq!(adapter(case, "out"), expected.adapter, "another adapter");
    }
}

/// What is done to a run, or to one rank of it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    KillRank,
    FreezeRank,
    FillDisk,
    CutNetwork,
    KillLauncher,
    Interrupt,
    Terminate,
}

const ALL_HARM: &[How] = &[How::KillRank, How::KillLauncher, How::Interrupt, How::Terminate];

const FAULTS: &[How] = &[How::KillRank, How::FreezeRank, How::FillDisk, How::CutNetwork];

impl How {
    /// What is counted.
    fn done(self) -> &'static str {
        match self {
            Self::KillRank => "ranks killed",
            Self::FreezeRank => "ranks frozen",
            Self::FillDisk => "disks filled",
            Self::CutNetwork => "networks cut",
            Self::KillLauncher => "launchers killed",
            Self::Interrupt | Self::Terminate => "interrupted",
        }
    }

    /// What is counted where this machine allows nobody to do it.
    fn skipped(self) -> &'static str {
        match self {
            Self::FillDisk => "skipped, as nobody may mount a disk here",
            Self::CutNetwork => "skipped, as nobody may have network namespaces here",
            _ => "skipped",
        }
    }
}

/// One start of a run.
struct Attempt<'a> {
    case: &'a Case,
    recipe: &'a str,
    settings: &'a [&'a str],
    expected: &'a Undisturbed,
}

impl Attempt<'_> {
    fn run(&self, draw: Draw, dice: &mut Dice, counts: &mut Counts) -> Ended {
        let first = draw(counts, dice);
        let elsewhere = match first {
            Some(How::FillDisk) => self.with_little_disk(dice, counts),
            Some(How::CutNetwork) => self.with_cut_network(dice, counts),
            _ => return self.with_harmed_ranks(first, draw, dice, counts),
        };
        elsewhere.unwrap_or_else(|| {
            count(counts, first.unwrap().skipped(), 1);
            self.with_harmed_ranks(None, &|_, _| None, dice, counts)
        })
    }

    fn moment(&self, dice: &mut Dice) -> Duration {
        self.expected.took.mul_f64(dice.below(1000) as f64 / 1000.0)
    }

    fn launch(&self) -> Vec<String> {
        let mut arguments = self.restarting(TIMEOUT);
        arguments.push(format!("--nproc={}", self.expected.ranks));
        arguments
    }

    /// The settings of a run that starts again by itself, whose ranks meet within so many seconds.
    fn restarting(&self, meeting: u64) -> Vec<String> {
        let own = [format!("--max-restarts={RESTARTS}"), format!("--rdzv-timeout={meeting}")];
        self.settings.iter().map(|setting| setting.to_string()).chain(own).collect()
    }

    /// Does `first` to it, and more as long as `draw` says so and ranks start again.
    fn with_harmed_ranks(&self, first: Option<How>, draw: Draw, dice: &mut Dice, counts: &mut Counts) -> Ended {
        let arguments = self.launch();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let run = Running::start(self.case.run(self.recipe, &arguments).env("OMP_NUM_THREADS", "1"));
        let launcher = run.pid;
        let (mut ways_to_end, mut harmed, mut next) = (vec![0], vec![], first);
        while let Some(how) = next {
            let (after, rank) = (self.moment(dice), dice.below(self.expected.ranks));
            sleep(after);
            next = None;
            match how {
                How::KillRank | How::FreezeRank => {
                    let worker = run.workers().into_iter().find(|(number, _)| *number == rank);
                    // The run may have come to its end.
                    if let Some((_, worker)) = worker {
                        let _ = kill_process(worker, if how == How::KillRank { Signal::KILL } else { Signal::STOP });
                        count(counts, how.done(), 1);
                        harmed.push((how, rank));
                        self.wait_for_end(worker);
                        // Disks and networks need a start of their own.
                        let is_possible = |how: &How| !matches!(how, How::FillDisk | How::CutNetwork);
                        next = draw(counts, dice).filter(|how| harmed.len() < RESTARTS && is_possible(how));
                    }
                }
                How::KillLauncher => {
                    run.signal(Signal::KILL);
                    ways_to_end.push(-1);
                    count(counts, how.done(), 1);
                    workers_of(launcher).into_iter().for_each(|(_, worker)| self.wait_for_end(worker));
                }
                How::Interrupt | How::Terminate => {
                    run.signal(if how == How::Interrupt { Signal::INT } else { Signal::TERM });
                    ways_to_end.extend([130, -1]);
                    // Whoever asks for a stop while ranks end for a lost one gets none started again.
                    ways_to_end.extend((!harmed.is_empty()).then_some(1));
                    count(counts, how.done(), 1);
                }
                How::FillDisk | How::CutNetwork => unreachable!("a run of its own"),
            }
            println!("  {how:?} (rank {rank}) after {after:.2?}");
        }
        let ended = run.wait_within(self.expected.longest());
        assert!(ways_to_end.contains(&ended.code), "exit {}, not one of {ways_to_end:?}\n{}", ended.code, ended.stderr);
        // Each start after the first has its reason, which is named.
        let mut reasons = harmed.iter();
        for line in restarts(&ended.stderr) {
            let is_reason = |(how, rank): &(How, usize)| match how {
                // Where it is the only one, or the other was killed before all had been stopped, none is named.
                How::KillRank if line.ends_with("signal 9 (SIGKILL)") => true,
                How::KillRank => line.ends_with(&format!("signal 9 (SIGKILL) (rank {rank})")),
                _ => line.contains(&format!("rank {rank}")),
            };
            assert!(reasons.any(is_reason), "not for {harmed:?}: {line}\n{}", ended.stderr);
        }
        ended
    }

    fn wait_for_end(&self, worker: Pid) {
        let started = Instant::now();
        while lives(worker) {
            assert!(started.elapsed() < self.expected.longest(), "{worker:?} outlives what was done to its run");
            sleep(Duration::from_millis(5));
        }
    }

    /// Runs on a disk of the folder's content and some KiB more; `None` where nobody may mount one.
    fn with_little_disk(&self, dice: &mut Dice, counts: &mut Counts) -> Option<Ended> {
        let room = dice.below(3 * self.expected.checkpoint_kib);
        let script = format!(
            "export OMP_NUM_THREADS=1
            rm -rf before after; cp -a out before; used=$(du -sk before | cut -f1)
            mount -t tmpfs -o size=$((used + {room} + 64))k none out; cp -a before/. out/
            code=0; train {} || code=$?
            cp -a out after; exit $code",
            quoted(&self.launch())
        );
        let ended = Running::start(&mut faults::mounting(self.case, self.recipe, &script)?);
        let ended = ended.wait_within(self.expected.longest());
        std::fs::remove_dir_all(self.case.path("out")).unwrap();
        std::fs::rename(self.case.path("after"), self.case.path("out")).unwrap();
        // What is written by halves goes with the next start, after which the disk may do.
        let is_full = ended.code == 1 || restarts(&ended.stderr).next().is_some();
        println!("  FillDisk, {room} KiB left: exit {}", ended.code);
        let says_so = |line: &str| line.contains("cannot write `out/");
        assert!(restarts(&ended.stderr).all(says_so), "{}", ended.stderr);
        assert!(
            ended.code == 0 || ended.code == 1 && ended.report().contains("No space left on device"),
            "{}",
            ended.stderr
        );
        count(counts, How::FillDisk.done(), usize::from(is_full));
        Some(ended)
    }

    /// Runs on as many machines as there are ranks, of which one loses its cable: for a moment, for longer than ranks wait, or
    /// for good. `None` where nobody may have namespaces.
    fn with_cut_network(&self, dice: &mut Dice, counts: &mut Counts) -> Option<Ended> {
        let (after, node) = (self.moment(dice), dice.below(self.expected.ranks));
        let back = match dice.below(3) {
            0 => Some(dice.below(1000 * TIMEOUT as usize / 2)),
            1 => Some(1000 * TIMEOUT as usize + dice.below(500 * REUNION as usize)),
            _ => None,
        };
        let meeting = if back.is_some() { REUNION } else { TIMEOUT };
        let arguments = self.restarting(meeting);
        let in_seconds = |millis: usize| format!("{:.3}", millis as f64 / 1000.0);
        let script = format!(
            "recipe={recipe}; limit='timeout -s KILL {limit}'
            train 1 {arguments} 2>log1 & one=$!
            train 0 {arguments} 2>log0 & zero=$!
            sleep {after}
            if kill -0 $zero 2>/dev/null; then echo cut; fi
            ip link set port{node} down
            {back}
            code=0; wait $zero || code=$?; echo $code
            code=0; wait $one || code=$?; echo $code",
            recipe = self.recipe,
            limit = self.expected.longest().as_secs(),
            arguments = quoted(&arguments),
            after = after.as_secs_f64(),
            back = back.map_or(String::new(), |back| format!("sleep {}; ip link set port{node} up", in_seconds(back))),
        );
        let mut command = nodes::with_nodes(self.case, self.expected.ranks, &script)?;
        let nodes = Running::start(&mut command).wait_within(2 * self.expected.longest());
        let log = |node: usize| std::fs::read_to_string(self.case.path(&format!("log{node}"))).unwrap_or_default();
        let (first, second) = (log(0), log(1));
        let is_cut = nodes.stdout.starts_with("cut\n");
        let codes: Vec<&str> = nodes.stdout.lines().filter(|line| *line != "cut").collect();
        let back = back.map_or("for good".to_owned(), |back| format!("for {} s", in_seconds(back)));
        println!("  CutNetwork of node {node} {back}, after {after:.2?}: exit {}", codes.join(", "));
        let ways_to_end: &[&str] = if is_cut && meeting == TIMEOUT { &["0", "1"] } else { &["0"] };
        let in_full = format!("{}{}\nnode 0: {first}\nnode 1: {second}", nodes.stdout, nodes.stderr);
        assert!(codes.len() == 2 && codes.iter().all(|code| ways_to_end.contains(code)), "{in_full}");
        assert!(!second.contains("is a bug") && !second.contains("panicked"), "{second}");
        count(counts, How::CutNetwork.done(), usize::from(is_cut));
        Some(Ended { code: i32::from(codes != ["0", "0"]), stdout: nodes.stdout, stderr: first })
    }
}

fn quoted(arguments: &[String]) -> String {
    arguments.iter().map(|argument| format!("'{argument}'")).collect::<Vec<_>>().join(" ")
}

/// What a launcher says when it starts its ranks again.
fn restarts(stderr: &str) -> impl Iterator<Item = &str> {
    stderr.lines().filter(|line| line.starts_with("restart "))
}

/// Checkpoints under their own names, which promise that they are whole.
fn whole(case: &Case) -> Vec<String> {
    let is_unfinished = |name: &String| name.starts_with('.') || name.ends_with(".old");
    case.checkpoints("out").into_iter().filter(|name| !is_unfinished(name)).collect()
}

/// What a run says it resumed from was whole. Of where it went on by itself its losses tell.
fn check_resumed(ended: &Ended, whole: &[String]) {
    let first_start = ended.stderr.lines().take_while(|line| !line.starts_with("restart "));
    for line in first_start.filter(|line| line.contains("resuming from ")) {
        let path = line.split('`').nth(1).unwrap_or_else(|| panic!("no folder in `{line}`"));
        let folder = path.rsplit('/').next().unwrap();
        let stepped_aside = folder.strip_suffix(".old").unwrap_or(folder);
        assert!(whole.contains(&folder.to_owned()) || stepped_aside != folder, "{line}, of {whole:?}");
    }
}

fn check_losses(lines: &[Value], restarts: usize, expected: &Undisturbed, counts: &mut Counts) {
    let (mut previous, mut jumps) = (None, 0);
    for line in lines {
        let (Some(step), Some(loss)) = (line["step"].as_u64(), line["loss"].as_f64()) else { continue };
        assert_eq!(loss.to_bits(), expected.losses[step as usize - 1].to_bits(), "step {step}: {line}");
        jumps += usize::from(previous.is_some_and(|previous| step != previous + 1));
        assert!(jumps <= restarts, "step {step} after {previous:?}, and {restarts} restarts");
        previous = Some(step);
        count(counts, "steps compared", 1);
    }
}

/// Every new folder with a checkpoint's name generates: merged weights where it has them, its adapter where not.
fn check_folders(case: &Case, loaded: &mut BTreeMap<String, Vec<u8>>, counts: &mut Counts) {
    for name in whole(case) {
        let state = std::fs::read(case.path("out").join(&name).join("resume.json"));
        let state = state.unwrap_or_else(|error| panic!("`{name}` has no `resume.json`: {error}"));
        if loaded.get(&name) == Some(&state) {
            continue;
        }
        let is_merged = case.path("out").join(&name).join("model.safetensors.index.json").is_file();
        let key = if is_merged { "checkpointer.checkpoint_dir" } else { "adapter_dir" };
        let folder = if is_merged { format!("out/{name}") } else { format!("out/{name}/adapter") };
        let override_ = format!("{key}={folder}");
        let mut generate = case.host(&["run", "generate", "--config", "generate.yaml", "max_new_tokens=1", &override_]);
        let ended = Ended::of(&mut generate);
        assert_eq!(ended.code, 0, "{folder}: {}", ended.stderr);
        count(counts, "folders loaded", 1);
        loaded.insert(name, state);
    }
}
