//! Disks that fill up and folders that cannot be written, in a mount namespace of the test's own.

use std::collections::BTreeMap;
use std::process::Command;

use insta::assert_snapshot;

use crate::case::{Case, Ended, LONG, WASM};

/// Steps 2, 4, 6, 8 and the end are saved, of which the newest two stay.
const SAVING: &[&str] = &["save_every_n_steps=2", "checkpointer.keep_last_n_checkpoints=2"];

/// Runs `script` in a shell that may mount what it alone sees; its `train` is `host run` of the recipe with `train.yaml`.
/// `None` where the machine allows nobody to mount.
pub fn mounting(case: &Case, recipe: &str, script: &str) -> Option<Command> {
    let shell = |script: &str| {
        let mut command = Command::new("unshare");
        case.prepare(&mut command);
        command.args(["--map-root-user", "--mount", "sh", "-euc", script]).env("HOST", case.host(&[]).get_program());
        command
    };
    std::fs::create_dir_all(case.path("out")).unwrap();
    if !shell("mount -t tmpfs none out").output().is_ok_and(|output| output.status.success()) {
        println!("not tested: this machine allows nobody to mount");
        return None;
    }
    let train = format!("train() {{ \"$HOST\" run {recipe} --config train.yaml \"$@\"; }}");
    Some(shell(&format!("{train}\n{script}")))
}

/// The same, to its end.
pub fn mounted(case: &Case, recipe: &str, script: &str) -> Option<Ended> {
    mounting(case, recipe, script).map(|mut command| Ended::of(&mut command))
}

/// The losses in the log of `kept`, of a step that was taken twice the second one; every line must be whole.
fn last_losses(case: &Case) -> Vec<f64> {
    let text = std::fs::read_to_string(case.path("kept/logs/log.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect(line));
    let losses = lines.filter_map(|line| Some((line["step"].as_u64()?, line["loss"].as_f64()?)));
    losses.collect::<BTreeMap<_, _>>().into_values().collect()
}

/// Whatever write the disk ends at: one error, the newest checkpoint whole, and more room is all it takes to go on.
#[test]
fn a_disk_that_fills() {
    let case = Case::new();
    let straight = case.losses(WASM, "straight", SAVING);
    let inputs = [case.contents("model"), case.contents("data")];
    let checkpoint = case.size("straight/epoch_0");
    // In checkpoints: two stay while the next is written.
    for (disk, whole) in [(0.001, 0), (0.3, 0), (0.99, 0), (1.2, 1), (1.99, 1), (2.4, 2), (2.99, 2)] {
        let bytes = (disk * checkpoint as f64) as u64;
        let Some(ended) = mounted(
            &case,
            WASM,
            &format!(
                "mount -t tmpfs -o size={bytes} none out
                code=0; train {saving} 2>&1 || code=$?
                echo exit $code, $(ls -A out)
                mount -o remount,size=1g out
                if [ -e out/step_2 ]; then train {saving} resume_from_checkpoint=True; else train {saving}; fi
                cp -a out kept",
                saving = SAVING.join(" ")
            ),
        ) else {
            return;
        };
        assert_eq!(ended.code, 0, "{disk}: {}", ended.stderr);
        let found = ended.stdout.lines().find(|line| line.starts_with("exit")).unwrap();
        assert_eq!(found, format!("exit 1, logs{}", ["", " loss.svg step_2", " loss.svg step_2 step_4"][whole]));
        let (_, error) = ended.stdout.split_once("error: ").unwrap();
        let next = 2 * whole + 2;
        assert!(error.starts_with(&format!("cannot write `out/.step_{next}.partial/")), "{error}");
        assert!(error.contains("cause: ") && error.contains("No space left on device (os error 28)"), "{error}");
        assert_eq!(last_losses(&case), straight);
        for folder in ["epoch_0", "epoch_0/adapter"] {
            let [kept, whole] = ["kept", "straight"].map(|run| case.contents(&format!("{run}/{folder}")));
            assert!(kept.keys().eq(whole.keys()), "{:?}", kept.keys());
            let is_weights = |name: &&String| name.ends_with(".safetensors");
            assert!(kept.keys().filter(is_weights).all(|name| kept[name] == whole[name]), "other weights");
        }
        std::fs::remove_dir_all(case.path("kept")).unwrap();
    }
    assert!([case.contents("model"), case.contents("data")] == inputs, "an input folder has changed");
}

/// Nothing but the output folder needs to be writable; that it is not is said before the first step.
#[test]
fn folders_that_cannot_be_written() {
    let case = Case::new();
    let read_only = |folders: &str, script: &str| {
        let mount = format!("for folder in {folders}; do mount --bind $folder $folder");
        mounted(&case, WASM, &format!("mkdir -p cache; {mount}; mount -o remount,bind,ro $folder; done\n{script}"))
    };
    let Some(ended) = read_only("model data cache", "train; cp -a out kept") else { return };
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(case.log("kept"), case.losses(WASM, "straight", &[]));
    let ended = read_only("out", "train").unwrap();
    assert_snapshot!(ended.report(), @"
    exit 2
    error: the output folder `out` cannot be written to
      --> train.yaml:1:13
    cause: `out`: Read-only file system (os error 30)
    hint: give another with `output_dir=FOLDER`
    ");
}

/// Nor does what is left of a line hinder the next run.
#[test]
fn a_disk_that_a_log_fills() {
    let case = Case::new();
    let straight = case.losses(WASM, "straight", LONG);
    let script = format!(
        "mount -t tmpfs -o size=8k none out; head -c 4096 /dev/zero > out/filler
        train {long} || echo ended, and left $(ls -A out)
        mount -o remount,size=1g out; train {long} 2>/dev/null; cp -a out kept",
        long = LONG.join(" ")
    );
    let Some(ended) = mounted(&case, WASM, &script) else { return };
    assert_eq!(ended.stdout, "ended, and left filler logs\n");
    assert_snapshot!(ended.report(), @"
    exit 0
    error: cannot write `out/logs/log.jsonl`
    cause: No space left on device (os error 28)
    ");
    assert_eq!(last_losses(&case), straight);
}
