//! `host check`: guests, looked at without running them.

use insta::assert_snapshot;

use crate::case::{Case, Ended, root};

fn check(case: &Case, file: &str) -> Ended {
    Ended::of(&mut case.host(&["check", file]))
}

#[test]
fn what_is_shipped_is_fine() {
    let case = Case::new();
    let mut files: Vec<String> = vec!["guests/focal.wasm".into(), "examples/own_loss/focal.rhai".into()];
    for folder in ["recipes", "templates", "scripts/recipes", "scripts/templates", "examples/own_template"] {
        let names = std::fs::read_dir(root().join(folder)).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let guests = names.filter(|name| name.ends_with(".wasm") || name.ends_with(".rhai"));
        files.extend(guests.map(|name| format!("{folder}/{name}")));
    }
    assert!(files.len() > 15, "{files:?}");
    for file in files {
        let ended = check(&case, &file);
        let kind = if file.contains("recipes") {
            "recipe"
        } else if file.contains("focal") {
            "loss"
        } else {
            "template"
        };
        assert_eq!(ended.code, 0, "{file}: {}", ended.stderr);
        assert!(ended.stdout.starts_with(&format!("{file}: a {kind}, ")), "{}", ended.stdout);
    }
}

#[test]
fn what_it_says() {
    let case = Case::new();
    case.write(
        "mine.rhai",
        "fn loss(logits, labels) { #{ sum: own(logits).sum(), weight: 1 } }\nfn own(x) { x.exp() }\n",
    );
    assert_snapshot!(check(&case, "mine.rhai").stdout, @"
    mine.rhai: a loss, Rhai script
    host:sdk   0.1.0, and all that it uses is granted
    functions  loss(logits, labels)
               own(x)
    ");
    let json = Ended::of(&mut case.host(&["check", "--json", "guests/focal.wasm"])).stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((json["kind"].as_str(), json["form"].as_str()), (Some("loss"), Some("Wasm component")));
    assert!(json["capabilities"].as_array().unwrap().iter().any(|name| name == "host:sdk/tensors@0.1.0"));
}

#[test]
fn what_a_guest_says_of_itself() {
    let case = Case::new();
    let inspect = |arguments: &[&str]| Ended::of(&mut case.host(&[&["inspect"], arguments].concat())).stdout;
    let own = |text: String| {
        let digest = text.lines().find_map(|line| line.strip_prefix("sha256     ")).unwrap().to_owned();
        let size = text.lines().find_map(|line| line.strip_prefix("size       ")).unwrap().to_owned();
        assert_eq!(digest.len(), 64);
        text.replace(&digest, "[DIGEST]").replace(&size, "[SIZE]")
    };
    // The same in both languages, but for what the script's comment says besides.
    assert_snapshot!(own(inspect(&["guests/focal.wasm"])), @"
    guests/focal.wasm: a loss, Wasm component
    about      Focal loss: tokens that the model is sure of count less.
    keys       gamma = 2.0: a number, at least 0.0; how much less; 0 is cross-entropy
    uses       host:sdk/types@0.1.0
               host:sdk/tensors@0.1.0
               13 interfaces of WASI, linked to nothing
    size       [SIZE]
    sha256     [DIGEST]
    ");
    assert_snapshot!(own(inspect(&["examples/own_loss/focal.rhai"])), @"
    examples/own_loss/focal.rhai: a loss, Rhai script
    about      Focal loss: tokens that the model is sure of count less. T.-Y. Lin and others, Focal Loss for Dense Object Detection (2017), equation 4.
    keys       gamma = 2.0: a number, at least 0.0; how much less; 0 is cross-entropy
    uses       host:sdk/types@0.1.0
               host:sdk/tensors@0.1.0
    size       [SIZE]
    sha256     [DIGEST]
    ");
    let keys = |file: &str| {
        let text = inspect(&["--json", file]);
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["metadata"]["keys"].clone()
    };
    assert_eq!(keys("guests/focal.wasm"), keys("examples/own_loss/focal.rhai"));
    case.write("t.rhai", "//! ```toml\n//! [keys.shout]\n//! type = \"flag\"\n//! ```\nfn render(row) { [] }\n");
    assert_snapshot!(check(&case, "t.rhai").stderr, @"
    error: the template `t.rhai` names the key `shout`, and is not given it
    hint: define `fn render(row, settings)`, or remove `[keys.shout]`
    ");
}

#[test]
fn what_is_wrong_is_said_by_line() {
    let case = Case::new();
    case.write(
        "wrong.rhai",
        "fn loss(logits, labels) {
    let p = logits.log_softmx(-1);
    let q = p.gather(1);
    host::opn();
    helper(q, q, q);
    #{ sum: q.sum(), weight: labels.shape[0] }
}
fn helper(x) { x }
",
    );
    assert_snapshot!(check(&case, "wrong.rhai").report(), @"
    exit 2
    error: there is no function `log_softmx`
      --> wrong.rhai:2:20
    hint: did you mean `log_softmax`?

    error: `gather` is given 1 argument, and takes 2
      --> wrong.rhai:3:15

    error: there is no function `host::opn`
      --> wrong.rhai:4:11
    hint: did you mean `host::log`?

    error: `helper` is given 3 arguments, and takes 1
      --> wrong.rhai:5:5
    ");
    case.write("render.rhai", "fn render(row) { [user(row.a), host::open()] }");
    assert_snapshot!(check(&case, "render.rhai").report(), @"
    exit 2
    error: there is no function `host::open`
      --> render.rhai:1:38
    hint: `sdk/REFERENCE.md` lists what there is
    ");
    // A recipe with a helper of a loss's name, and a function in a map, are fine.
    case.write(
        "fine.rhai",
        "let run = host::open();
let named = #{ twice: |x| x * 2 };
for step in run.steps() {
    for batch in step.batches() { let l = loss(run.model, batch); step.backward(l.sum, l.weight + named.twice(0)); }
    step.finish();
}
fn loss(model, batch) { model.loss(batch) }
",
    );
    assert_eq!(check(&case, "fine.rhai").code, 0);
    case.write("broken.rhai", "let run = host::open(;");
    assert_snapshot!(check(&case, "broken.rhai").report(), @"
    exit 2
    error: cannot read the script `broken.rhai`
      --> broken.rhai:1:22
    cause: Unexpected ';'
    ");
    case.write("core.wasm", b"\0asm\x01\0\0\0");
    assert_snapshot!(check(&case, "core.wasm").report(), @"
    exit 2
    error: the recipe `core.wasm` is a core Wasm module, not a component
    hint: build it with `cargo build --target wasm32-wasip2`
    ");
    assert_snapshot!(check(&case, "guests/wants_files.wasm").report(), @"
    exit 2
    error: the recipe `guests/wants_files.wasm` wants `wasi:filesystem/types`, which guests do not get
    cause: it imports `wasi:filesystem/types`, `wasi:filesystem/preopens`, `wasi:clocks/wall-clock`
    hint: a guest has no files: remove what uses `std::fs`; data comes as rows, settings from the config
    ");
    assert_snapshot!(check(&case, "absent.rhai").report(), @"
    exit 2
    error: cannot read the guest `absent.rhai`
    cause: No such file or directory (os error 2)
    hint: `host ls` lists the recipes; `cargo xtask build` builds the shipped ones
    ");
}
