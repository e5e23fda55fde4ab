//! `isolate: true`: the same messages and errors from a process that has nothing but its pipes.

use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Output};

use host::config::plan::GuestLimits;
use host::data::template::{Cell, MESSAGES, Message, Outcome, Role, Row, RowTemplate};
use host_rank::script::{isolate, template};
use rustix::process::{Pid, Signal, kill_process};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use tracing_subscriber::layer::SubscriberExt;

use crate::support::{guest, root, tight};

const WORKER: &str = env!("CARGO_BIN_EXE_host-rank");
/// Of [`held`], what it shall try.
const TRY: &str = "HOST_TEST_TRY";

pub fn opened(path: &str, limits: &GuestLimits, isolated: bool) -> host::Result<Box<dyn RowTemplate>> {
    let guest = guest(path);
    let bytes = std::fs::read(root().join(path)).unwrap();
    if isolated {
        isolate::open_with(Path::new(WORKER), &guest, bytes, limits)?.open()
    } else {
        template::open_bytes(&guest, bytes, limits)?.open()
    }
}

fn process(path: &str) -> isolate::Process {
    let bytes = std::fs::read(root().join(path)).unwrap();
    isolate::Process::start(Path::new(WORKER), &guest(path), &bytes, &tight()).unwrap()
}

fn row(id: u64, text: &str) -> Row {
    Row { id, cells: vec![Cell::Text(text.to_owned())] }
}

/// What a template makes of rows, or says instead: the same in both ways, or the test fails.
#[track_caller]
fn both(path: &str, columns: &[&str], rows: &[Row]) -> Result<Vec<Outcome>, String> {
    both_within(&tight(), path, columns, rows)
}

#[track_caller]
fn both_within(limits: &GuestLimits, path: &str, columns: &[&str], rows: &[Row]) -> Result<Vec<Outcome>, String> {
    let [here, isolated] = [false, true].map(|isolated| {
        let mut template = opened(path, limits, isolated).map_err(|error| error.to_string())?;
        let columns: Vec<String> = columns.iter().map(|column| (*column).to_owned()).collect();
        template.configure(&columns).and_then(|_| template.render(rows.to_vec())).map_err(|error| error.to_string())
    });
    match (&here, &isolated) {
        (Ok(here), Ok(isolated)) => assert!(here == isolated, "the messages differ"),
        _ => assert_eq!(here.as_ref().err(), isolated.as_ref().err()),
    }
    isolated
}

fn script(text: &str, rows: &[Row]) -> Result<Vec<Outcome>, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.rhai");
    std::fs::write(&path, text).unwrap();
    both(path.to_str().unwrap(), &["input"], rows).map_err(|error| error.replace(dir.path().to_str().unwrap(), "[DIR]"))
}

#[test]
fn rows_become_the_same_messages() {
    // More than go in one message, of all lengths, with texts of every kind.
    let row = |id: u64| {
        let text = format!("{id} “\u{1f600}”\0\n").repeat(1 + id as usize % 700);
        let messages = vec![
            Message::of(Role::System, "s"),
            Message {
                role: Role::User,
                parts: vec![text, String::new()],
                calls: vec![],
                train: Some(id.is_multiple_of(2)),
            },
            Message::of(Role::Assistant, "answer"),
        ];
        Row { id, cells: vec![Cell::Messages(messages)] }
    };
    let rows: Vec<Row> = (0..1500).map(row).collect();
    for path in ["templates/summarize.wasm", "templates/summarize.rhai"] {
        let outcomes = both_within(&GuestLimits::default(), path, &["input", "output", MESSAGES], &rows).unwrap();
        assert!(outcomes.len() == 1500 && outcomes.iter().all(|outcome| matches!(outcome, Outcome::Keep(_))));
    }
    let outcomes = both("target/guests/odd_template.wasm", &["input"], &[self::row(0, "skips"), self::row(1, "fails")]);
    assert_eq!(outcomes.unwrap(), [Outcome::Skip("odd".into()), Outcome::Fail("bad\u{fffd}row".into())]);
}

#[test]
fn the_digest_is_the_same() {
    let (path, limits) = ("templates/summarize.wasm", GuestLimits::default());
    let bytes = std::fs::read(root().join(path)).unwrap();
    let isolated = isolate::open_with(Path::new(WORKER), &guest(path), bytes.clone(), &limits).unwrap();
    assert_eq!(isolated.digest(), template::open_bytes(&guest(path), bytes, &limits).unwrap().digest());
}

/// Each is also what the template says without isolation: `both` compares.
#[test]
fn errors_are_the_same() {
    let odd = "target/guests/odd_template.wasm";
    insta::assert_snapshot!(both(odd, &["input"], &[row(7, "text"), row(8, "panics")]).unwrap_err(), @"
    error: template `target/guests/odd_template.wasm` failed on rows 7 to 8
      --> tests/scripting/guests/odd_template/src/lib.rs:27
    cause: thread '<unnamed>' (1) panicked at tests/scripting/guests/odd_template/src/lib.rs:27:25:
    cause: row 8 is odd
    cause: in `render` (tests/scripting/guests/odd_template/src/lib.rs:27)
    cause: in `outcome` (tests/scripting/guests/odd_template/src/lib.rs:48)
    ");
    insta::assert_snapshot!(both(odd, &["input"], &[row(7, "loops")]).unwrap_err(), @"
    error: template `target/guests/odd_template.wasm` failed on row 7
      --> tests/scripting/guests/odd_template/src/lib.rs:25
    cause: the guest computed for more than 0.4 s without a turn of its loop
    cause: in `render` (tests/scripting/guests/odd_template/src/lib.rs:25)
    cause: in `outcome` (tests/scripting/guests/odd_template/src/lib.rs:48)
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    insta::assert_snapshot!(both(odd, &["input"], &[row(7, "hoards")]).unwrap_err(), @"
    error: template `target/guests/odd_template.wasm` failed on row 7
      --> tests/scripting/guests/odd_template/src/lib.rs:34
    cause: the guest asked for 65 MiB of memory, and its limit is 64 MiB
    cause: memory allocation of 1048576 bytes failed
    cause: in `render` (tests/scripting/guests/odd_template/src/lib.rs:34)
    cause: in `outcome` (tests/scripting/guests/odd_template/src/lib.rs:48)
    hint: `limits.memory_mb` raises the limit
    ");
    insta::assert_snapshot!(both(odd, &["refused"], &[]).unwrap_err(), @"
    error: template `target/guests/odd_template.wasm` failed on the columns refused
      --> tests/scripting/guests/odd_template/src/lib.rs:16
    cause: column `refused` is refused
    hint: rename it
    ");
    insta::assert_snapshot!(both("recipes/lora_distributed.wasm", &[], &[]).unwrap_err(), @"
    error: `recipes/lora_distributed.wasm` is a recipe, not a template
    hint: a template in Rust ends with `host_sdk::template!(…)`
    ");
    insta::assert_snapshot!(script("fn render(row) {\n    row.text\n}", &[row(4, "a")]).unwrap_err(), @"
    error: template `[DIR]/t.rhai` failed on row 4
      --> [DIR]/t.rhai:2:9
    cause: no property `text`
    hint: the row's columns are input; `column_map` names them
    ");
    insta::assert_snapshot!(script("fn render(row) {\n    loop { }\n}", &[row(4, "a")]).unwrap_err(), @"
    error: template `[DIR]/t.rhai` failed on row 4
    cause: the guest computed for more than 0.4 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    ");
    insta::assert_snapshot!(script("fn render(row) {\n    let s = \"x\";\n    loop { s += s; }\n}", &[row(4, "a")]).unwrap_err(), @"
    error: template `[DIR]/t.rhai` failed on row 4
    cause: Length of string too large
    ");
    insta::assert_snapshot!(script("fn render(row) {\n    [\n}", &[]).unwrap_err(), @"
    error: cannot read the script `[DIR]/t.rhai`
      --> [DIR]/t.rhai:3:1
    cause: Unexpected '}'
    ");
}

/// Each value is within Rhai's limits, all of them together are not: what only a process can stop.
#[test]
fn a_script_that_hoards_is_ended_and_the_run_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.rhai");
    let text = "fn render(row) {\n    let text = \"x\";\n    text.pad(500000, \"y\");\n    let held = #{};\n    \
                for i in 0..1000000 {\n        held[`k${i}`] = text + i;\n    }\n}";
    std::fs::write(&path, text).unwrap();
    let limits = GuestLimits { seconds: f64::INFINITY, ..tight() };
    let mut template = opened(path.to_str().unwrap(), &limits, true).unwrap();
    template.configure(&["input".into()]).unwrap();
    let error = template.render(vec![row(4, "a")]).unwrap_err();
    insta::assert_snapshot!(error.to_string().replace(dir.path().to_str().unwrap(), "[DIR]"), @"
    error: template `[DIR]/t.rhai` failed on row 4
    cause: Length of string too large
    ");
    assert_eq!(template.render(vec![row(5, "a")]).unwrap_err(), error, "it repeats its first error");
}

/// What no limit of the engine's sees: the row comes before the guest, and is there twice while it is read.
#[test]
fn a_process_that_reaches_its_own_memory_limit_says_so() {
    let mut template = process("templates/summarize.rhai");
    template.configure(&[MESSAGES.into()]).unwrap();
    insta::assert_snapshot!(template.render(vec![row(4, &"x".repeat(250 << 20))]).unwrap_err(), @"
    error: template `templates/summarize.rhai` failed on row 4
    cause: its process had no more memory: the guest's 64 MiB and what it needs itself are used
    hint: look for a value that grows and grows; `limits.memory_mb` raises the limit
    ");
}

#[test]
fn a_killed_process_is_named() {
    let mut template = process("templates/summarize.rhai");
    kill_process(Pid::from_raw(template.id() as i32).unwrap(), Signal::KILL).unwrap();
    insta::assert_snapshot!(template.configure(&[MESSAGES.into()]).unwrap_err(), @"
    error: template `templates/summarize.rhai` failed on the columns messages
    cause: its process was killed by signal 9 (SIGKILL)
    cause: nobody here sent it; the kernel does when memory runs out (`dmesg` then shows `Out of memory`)
    hint: end other programs, or lower `limits.memory_mb`
    ");
}

/// Whatever of its worker was left open. All its threads are held: there was one when it was.
#[test]
fn it_has_nothing_but_its_pipes() {
    // What libraries of the worker may leave open.
    let leaked = std::fs::File::open(root().join("Cargo.toml")).unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    for path in ["templates/summarize.wasm", "templates/summarize.rhai"] {
        let template = process(path);
        let proc = Path::new("/proc").join(template.id().to_string());
        let files = std::fs::read_dir(proc.join("fd")).unwrap();
        let mut files: Vec<String> =
            files.map(|file| std::fs::read_link(file.unwrap().path()).unwrap().to_str().unwrap().to_owned()).collect();
        files.iter_mut().for_each(|file| file.truncate(file.find(':').unwrap_or(file.len())));
        files.sort();
        // Standard output is there twice.
        assert_eq!(files, ["/memfd", "pipe", "pipe", "pipe"]);
        let status = std::fs::read_to_string(proc.join("status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        assert_eq!([field("NoNewPrivs:"), field("Seccomp:")], [Some("1"), Some("2")], "{status}");
        let environment = std::fs::read_to_string(proc.join("environ")).unwrap();
        assert!(environment.split('\0').all(|var| var.is_empty() || var.starts_with("LD_LIBRARY_PATH=")));
        for task in std::fs::read_dir(proc.join("task")).unwrap() {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            assert!(status.contains("Seccomp:\t2"), "{status}");
        }
        let limits = std::fs::read_to_string(proc.join("limits")).unwrap();
        let limit = |name: &str| limits.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
        assert_eq!(limit("Max core file size"), Some("0"));
        assert_eq!(limit("Max open files"), Some("8"));
        let data: u64 = limit("Max data size").unwrap().parse().unwrap();
        assert!((320 << 20..1 << 30).contains(&data), "{data}");
    }
}

/// Runs [`held`] in a process of its own.
fn try_to(what: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "isolate::held", "--ignored", "--nocapture"]).env(TRY, what).output().unwrap()
}

/// What the kernel holds a template with, each alone: the other would hide that it does nothing.
#[test]
fn the_kernel_refuses_files_network_and_programs() {
    let said = |what: &str| {
        let output = try_to(what);
        assert!(output.status.success(), "{what}: {output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().find_map(|line| Some(line.split_once("held: ")?.1.to_owned())).unwrap()
    };
    assert_eq!(said("landlock open"), "Permission denied (os error 13)");
    assert_eq!(said("landlock connect"), "Permission denied (os error 13)");
    assert_eq!(said("seccomp open"), "Function not implemented (os error 38)");
    for what in ["seccomp connect", "seccomp start", "seccomp kill"] {
        assert_eq!(try_to(what).status.signal(), Some(Signal::SYS.as_raw()), "{what}");
    }
    // And neither without being held.
    assert_eq!(said("nothing open"), "done");
    assert_eq!(said("nothing start"), "done");
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn held() {
    let Ok(what) = std::env::var(TRY) else { return };
    let (layer, attempt) = what.split_once(' ').unwrap();
    match layer {
        "landlock" => assert_ne!(isolate::restrict_files().unwrap(), landlock::RulesetStatus::NotEnforced),
        "seccomp" => isolate::restrict_calls().unwrap(),
        _ => {}
    }
    if layer == "without" {
        // As a kernel that was built without it would answer.
        let calls = [(libc::SYS_landlock_create_ruleset, vec![])].into();
        let missing = SeccompAction::Errno(libc::ENOSYS as u32);
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, missing, arch).unwrap();
        seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
        let start = || drop(process("templates/summarize.rhai"));
        print!("held: {}", logged(|| [start, start].into_iter().for_each(|start| start())));
        return;
    }
    let result = match attempt {
        "open" => std::fs::File::open("/etc/passwd").map(drop),
        "connect" => TcpStream::connect((Ipv4Addr::LOCALHOST, 9)).map(drop),
        "start" => Err(Command::new("echo").arg("held: done").exec()),
        _ => kill_process(rustix::process::getppid().unwrap(), Signal::CONT).map_err(std::io::Error::from),
    };
    println!("held: {}", result.map_or_else(|error| error.to_string(), |()| "done".to_owned()));
}

/// It is said once, and the rest holds.
#[test]
fn a_kernel_without_landlock_is_told_of() {
    let text = String::from_utf8(try_to("without landlock").stdout).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("held: ") || line.contains("WARN")).collect();
    insta::assert_snapshot!(lines.join("\n"), @"held:  WARN host_rank::script::isolate::process: this kernel has no landlock: `isolate` holds templates without it, by their engine, a process and a memory limit");
}

/// Of a worker that is killed while its template computes, the kernel ends the template's process.
#[test]
fn it_dies_with_its_worker() {
    let mut worker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "isolate::computes", "--ignored", "--nocapture"])
        .env(TRY, "compute")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(worker.stdout.take().unwrap()));
    let pid = lines.find_map(|line| Some(line.unwrap().split_once("process: ")?.1.to_owned())).unwrap();
    let status = Path::new("/proc").join(&pid).join("status");
    let lives = || {
        let status = std::fs::read_to_string(&status).unwrap_or_default();
        // Its new parent may not have waited for it yet.
        !status.is_empty() && !status.contains("State:\tZ")
    };
    assert!(lives());
    worker.kill().unwrap();
    worker.wait().unwrap();
    while lives() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn computes() {
    if std::env::var(TRY).as_deref() != Ok("compute") {
        return;
    }
    let path = "target/guests/odd_template.wasm";
    let bytes = std::fs::read(root().join(path)).unwrap();
    let limits = GuestLimits { seconds: f64::INFINITY, ..tight() };
    let mut template = isolate::Process::start(Path::new(WORKER), &guest(path), &bytes, &limits).unwrap();
    template.configure(&["input".into()]).unwrap();
    println!("process: {}", template.id());
    template.render(vec![row(0, "loops")]).unwrap();
}

/// The same lines, the same number of them, from both.
#[test]
fn lines_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.rhai");
    std::fs::write(&path, "fn render(row) {\n    print(`a ${row.input}\u{1b}[2J`);\n    debug(row.input);\n    []\n}")
        .unwrap();
    let [here, isolated] = [false, true].map(|isolated| {
        logged(|| {
            let mut template = opened(path.to_str().unwrap(), &tight(), isolated).unwrap();
            template.configure(&["input".into()]).unwrap();
            template.render((0..6000).map(|id| row(id, &id.to_string())).collect()).unwrap();
        })
    });
    assert!(here == isolated);
    let shown = isolated.replace(dir.path().to_str().unwrap(), "[DIR]");
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), 10_001);
    insta::assert_snapshot!([&lines[..2], &lines[10_000..]].concat().join("\n"), @r#"
    INFO guest: a 0�[2J guest=[DIR]/t.rhai
    INFO guest: line 3, position 5: "0" guest=[DIR]/t.rhai
    WARN guest: 10000 lines were logged; the rest is dropped (`limits.log_lines`) guest=[DIR]/t.rhai
    "#);
}

/// What `work` logs.
fn logged(work: impl FnOnce()) -> String {
    let lines = Lines::default();
    let to = lines.clone();
    let log = tracing_subscriber::fmt::layer().without_time().with_ansi(false).with_writer(move || to.clone());
    tracing::subscriber::with_default(tracing_subscriber::registry().with(log), work);
    String::from_utf8(std::mem::take(&mut lines.0.lock().unwrap())).unwrap()
}

#[derive(Clone, Default)]
struct Lines(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
