//! What `ends` and `faults` do once, done at random for as long as one likes: `cargo xtask soak --minutes 10 --seed 1`.
//!
//! Every run is one of a few undisturbed ones, so each loss it logs is known beforehand, whatever was done to it.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::case::{Case, Ended, RHAI, Running, WASM, workers_of};
use crate::faults;

/// Two epochs of 80 steps on one rank, of 40 on two.
const RUN: &[&str] = &[
    "dataset.split=train[:80]",
    "batch_size=1",
    "gradient_accumulation_steps=1",
    "epochs=2",
    "run_val_every_n_steps=25",
];
/// How a run that was harmed goes on: by hand, or with `--max-restarts` by itself.
const LAUNCH: &[&str] = &[];
/// A rank that waits for a frozen one gives up after this.
const TIMEOUT: &[&str] = &["--rdzv-timeout=6", "collective_timeout_seconds=6"];
const RESUME: &str = "resume_from_checkpoint=True";
/// Harm to one run before it is left alone.
const MOST_HARM: usize = 4;
/// Workers of a launcher that was killed follow it within this.
const ORPHANS: Duration = Duration::from_secs(20);
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
    harm_many(setting("HOST_SOAK_FAULTS", 50.0) as usize, &case, &undisturbed[1], &mut dice, &mut counts);
    let started = Instant::now();
    while started.elapsed() < time {
        soak_one_run(&case, dice.pick(&undisturbed), ALL_HARM, &mut dice, &mut counts);
        std::fs::remove_dir_all(case.path("out")).unwrap();
    }
    println!("{:.1} minutes:", started.elapsed().as_secs_f64() / 60.0);
    counts.iter().for_each(|(what, count)| println!("  {what}: {count}"));
}

/// Killed, frozen, out of disk: whichever rank, at whatever moment.
#[test]
fn five_faults() {
    let case = Case::new();
    let undisturbed = Undisturbed::run(&case, 2);
    let mut counts = BTreeMap::new();
    harm_many(5, &case, &undisturbed, &mut Dice(5), &mut counts);
    println!("{counts:?}");
}

fn harm_many(faults: usize, case: &Case, run: &Undisturbed, dice: &mut Dice, counts: &mut Counts) {
    let done = |counts: &Counts| {
        let kinds = ["ranks killed", "ranks frozen", "disks filled"];
        kinds.map(|what| counts.get(what).unwrap_or(&0)).into_iter().sum::<usize>()
    };
    while done(counts) < faults {
        soak_one_run(case, run, FAULTS, dice, counts);
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
    let kills = |counts: &Counts| {
        ["ranks killed", "launchers killed"].map(|what| counts.get(what).unwrap_or(&0)).into_iter().sum::<usize>()
    };
    while kills(&counts) < 20 {
        soak_one_run(&case, &undisturbed, &[How::KillRank, How::KillLauncher], &mut dice, &mut counts);
        std::fs::remove_dir_all(case.path("out")).unwrap();
    }
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
    nproc: String,
    losses: Vec<f64>,
    adapter: Vec<u8>,
    took: Duration,
    checkpoint_kib: usize,
}

impl Undisturbed {
    fn run(case: &Case, ranks: usize) -> Self {
        let nproc = format!("--nproc={ranks}");
        let dir = format!("undisturbed_{ranks}");
        let started = Instant::now();
        let losses = case.losses(WASM, &dir, &[RUN, &[&nproc]].concat());
        assert_eq!(losses.len(), 160 / ranks);
        let took = started.elapsed();
        // Validated, saved and begun a second epoch at the half, it has needed all the memory it ever should.
        let lines = lines(case, &dir);
        let peaks: Vec<f64> = lines.iter().filter_map(|line| line["peak_rss_mb"].as_f64()).collect();
        let (half, end) = (peaks[peaks.len() / 2 + 5], peaks[peaks.len() - 1]);
        println!("{ranks} ranks: {took:.1?}, {half:.0} MB at the half, {end:.0} MB at the end");
        assert!(end < GROWTH * half, "memory grows: {peaks:?}");
        let checkpoint_kib = case.size(&format!("{dir}/epoch_1")) as usize / 1024;
        Self { ranks, nproc, losses, adapter: adapter(case, &dir), took, checkpoint_kib }
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

/// Starts a run, disturbs it, goes on with it, and so on to its end; then goes on once more from the middle.
fn soak_one_run(case: &Case, expected: &Undisturbed, harms: &[How], dice: &mut Dice, counts: &mut Counts) {
    let recipe = *dice.pick(&[WASM, RHAI]);
    let every = format!("save_every_n_steps={}", dice.pick(&[3, 7, 20, 50]));
    let choices: [&[&str]; 2] = [&[], &["checkpointer.keep_last_n_checkpoints=1"]];
    let keep = *dice.pick(&choices);
    let adapter_only = *dice.pick(&["save_adapter_weights_only=True", "save_adapter_weights_only=False"]);
    let settings = [RUN, LAUNCH, &[&expected.nproc, &every, adapter_only], keep].concat();
    println!("{recipe} {}", settings[RUN.len()..].join(" "));
    count(counts, "runs", 1);

    let mut loaded = BTreeMap::new();
    let mut disturb = |extra: &[&str], harm: Option<Harm>, counts: &mut Counts| {
        let logged = lines(case, "out").len();
        let before = whole(case);
        let ended = attempt(case, recipe, &[&settings[..], extra].concat(), harm, counts);
        check_resumed(&ended, &before);
        check_losses(&lines(case, "out")[logged..], expected, counts);
        check_folders(case, &mut loaded, counts);
        ended.code == 0
    };
    let mut disturbed = 0;
    let complete = loop {
        let resume: &[&str] = if whole(case).is_empty() { &[] } else { &[RESUME] };
        count(counts, if resume.is_empty() { "begun" } else { "resumed" }, 1);
        let harm = (disturbed < MOST_HARM).then(|| Harm::draw(harms, dice, expected));
        disturbed += 1;
        if disturb(resume, harm, counts) || disturbed > MOST_HARM {
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
        assert!(disturb(&[RESUME, &from], None, counts));
        assert_eq!(adapter(case, "out"), expected.adapter, "another adapter");
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    KillRank,
    KillLauncher,
    Interrupt,
    Terminate,
    FreezeRank,
    FillDisk,
}

const ALL_HARM: &[How] = &[How::KillRank, How::KillLauncher, How::Interrupt, How::Terminate];

const FAULTS: &[How] = &[How::KillRank, How::FreezeRank, How::FillDisk];

/// What is done to a run, or to one rank of it, and when.
struct Harm {
    how: How,
    rank: usize,
    after: Duration,
    /// KiB that a full disk has left for checkpoints.
    room: usize,
}

impl Harm {
    fn draw(from: &[How], dice: &mut Dice, run: &Undisturbed) -> Self {
        let after = run.took.mul_f64(dice.below(1000) as f64 / 1000.0);
        let room = dice.below(3 * run.checkpoint_kib);
        Self { how: *dice.pick(from), rank: dice.below(run.ranks), after, room }
    }
}

fn attempt(case: &Case, recipe: &str, settings: &[&str], harm: Option<Harm>, counts: &mut Counts) -> Ended {
    if let Some(Harm { how: How::FillDisk, room, .. }) = harm
        && let Some(ended) = with_little_disk(case, recipe, settings, room, counts)
    {
        return ended;
    }
    let timeout: &[&str] = if harm.as_ref().is_some_and(|harm| harm.how == How::FreezeRank) { TIMEOUT } else { &[] };
    let run = Running::start(&mut case.run(recipe, &[settings, timeout].concat()));
    let launcher = run.pid;
    let (mut ways_to_end, mut frozen) = (vec![0], None);
    if let Some(Harm { how, rank, after, room: _ }) = harm {
        sleep(after);
        match how {
            // Where nobody may mount a disk, it is a kill.
            How::KillRank | How::FillDisk => {
                if let Some((_, worker)) = run.workers().into_iter().find(|(number, _)| *number == rank) {
                    // It may have ended by itself meanwhile.
                    let _ = kill_process(worker, Signal::KILL);
                    count(counts, "ranks killed", 1);
                }
                ways_to_end.push(1);
            }
            How::FreezeRank => {
                if let Some((_, worker)) = run.workers().into_iter().find(|(number, _)| *number == rank) {
                    let _ = kill_process(worker, Signal::STOP);
                    count(counts, "ranks frozen", 1);
                    frozen = Some(rank);
                }
                ways_to_end.push(1);
            }
            How::KillLauncher => {
                run.signal(Signal::KILL);
                ways_to_end.push(-1);
                count(counts, "launchers killed", 1);
            }
            How::Interrupt | How::Terminate => {
                run.signal(if matches!(how, How::Interrupt) { Signal::INT } else { Signal::TERM });
                ways_to_end.extend([130, -1]);
                count(counts, "interrupted", 1);
            }
        }
        println!("  {how:?} (rank {rank}) after {after:.2?}");
        if matches!(how, How::KillLauncher) {
            let killed = Instant::now();
            while !workers_of(launcher).is_empty() {
                assert!(killed.elapsed() < ORPHANS, "workers outlive their launcher: {:?}", workers_of(launcher));
                sleep(Duration::from_millis(5));
            }
        }
    }
    let ended = run.wait();
    if let Some(rank) = frozen.filter(|_| ended.code == 1) {
        let (_, report) = ended.stderr.split_once("error: ").unwrap();
        assert!(report.contains(&format!("rank {rank}")), "rank {rank} is not named: {}", ended.stderr);
    }
    assert!(ways_to_end.contains(&ended.code), "exit {}, not one of {ways_to_end:?}\n{}", ended.code, ended.stderr);
    assert!(!ended.stderr.contains("is a bug") && !ended.stderr.contains("panicked"), "{}", ended.stderr);
    assert_eq!(workers_of(launcher), [], "a worker is left");
    ended
}

/// Runs on a disk of the folder's content and `room` KiB more; `None` where nobody may mount one.
fn with_little_disk(case: &Case, recipe: &str, settings: &[&str], room: usize, counts: &mut Counts) -> Option<Ended> {
    let settings = settings.iter().map(|setting| format!("'{setting}'")).collect::<Vec<_>>().join(" ");
    let script = format!(
        "rm -rf before after; cp -a out before; used=$(du -sk before | cut -f1)
        mount -t tmpfs -o size=$((used + {room} + 64))k none out; cp -a before/. out/
        code=0; train {settings} || code=$?
        cp -a out after; exit $code"
    );
    let ended = faults::mounted(case, recipe, &script)?;
    std::fs::remove_dir_all(case.path("out")).unwrap();
    std::fs::rename(case.path("after"), case.path("out")).unwrap();
    println!("  FillDisk, {room} KiB left: exit {}", ended.code);
    let is_full = ended.stderr.contains("No space left on device");
    assert!(ended.code == if is_full { 1 } else { 0 }, "exit {}\n{}", ended.code, ended.stderr);
    assert!(!ended.stderr.contains("is a bug") && !ended.stderr.contains("panicked"), "{}", ended.stderr);
    count(counts, "disks filled", usize::from(is_full));
    Some(ended)
}

/// Checkpoints under their own names, which promise that they are whole.
fn whole(case: &Case) -> Vec<String> {
    let is_unfinished = |name: &String| name.starts_with('.') || name.ends_with(".old");
    case.checkpoints("out").into_iter().filter(|name| !is_unfinished(name)).collect()
}

/// What a run says it resumed from was whole.
fn check_resumed(ended: &Ended, whole: &[String]) {
    for line in ended.stderr.lines().filter(|line| line.contains("resuming from ")) {
        let path = line.split('`').nth(1).unwrap_or_else(|| panic!("no folder in `{line}`"));
        let folder = path.rsplit('/').next().unwrap();
        let stepped_aside = folder.strip_suffix(".old").unwrap_or(folder);
        assert!(whole.contains(&folder.to_owned()) || stepped_aside != folder, "{line}, of {whole:?}");
    }
}

fn check_losses(lines: &[Value], expected: &Undisturbed, counts: &mut Counts) {
    let mut previous = None;
    for line in lines {
        let (Some(step), Some(loss)) = (line["step"].as_u64(), line["loss"].as_f64()) else { continue };
        assert_eq!(loss.to_bits(), expected.losses[step as usize - 1].to_bits(), "step {step}: {line}");
        assert!(previous.is_none_or(|previous| step == previous + 1), "step {step} after {previous:?}");
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
