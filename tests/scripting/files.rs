//! Files that are not what the config needs.

use host::config::plan::{GuestLimits, GuestRef};
use host_rank::script::{Recipe, open_template};
use serde_json::json;

use crate::support::{guest, root};

fn load_error(guest: &GuestRef) -> String {
    match Recipe::load(guest, &GuestLimits::default()) {
        Ok(_) => "no error".into(),
        Err(error) => {
            assert_eq!(error.exit_code(), 2, "{error}");
            error.to_string()
        }
    }
}

/// The error about a file of this name and content.
fn file_error(name: &str, content: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    load_error(&guest(&path)).replace(dir.path().to_str().unwrap(), "[DIR]")
}

#[test]
fn missing() {
    insta::assert_snapshot!(load_error(&guest("recipes/none.wasm")), @r#"
    error: cannot read the recipe `recipes/none.wasm`
    cause: No such file or directory (os error 2)
    hint: `host ls` lists the recipes; `cargo xtask build` builds the shipped ones
    "#);
}

#[test]
fn folder() {
    insta::assert_snapshot!(load_error(&guest("recipes")), @r#"
    error: cannot read the recipe `recipes`
    cause: it is not a file
    "#);
}

#[test]
fn text_named_wasm() {
    insta::assert_snapshot!(file_error("r.wasm", b"hello \x1b[2J there\nand more"), @r#"
    error: the recipe `[DIR]/r.wasm` is a text file, not a Wasm component
    cause: it starts with `hello �[2J there`
    hint: a Rhai script's name ends in `.rhai`
    "#);
}

#[test]
fn core_module() {
    insta::assert_snapshot!(file_error("r.wasm", b"\0asm\x01\0\0\0"), @r#"
    error: the recipe `[DIR]/r.wasm` is a core Wasm module, not a component
    hint: build it with `cargo build --target wasm32-wasip2`
    "#);
}

#[test]
fn neither() {
    insta::assert_snapshot!(file_error("r.rhai", b"\xff\xfe\0\0"), @r#"
    error: the recipe `[DIR]/r.rhai` is neither a Wasm component nor a Rhai script
    hint: name a file that `host ls` lists, or build one with `cargo build --target wasm32-wasip2`
    "#);
}

#[test]
fn cut_short() {
    let whole = std::fs::read(root().join("recipes/lora_distributed.wasm")).unwrap();
    let error = file_error("r.wasm", &whole[..whole.len() / 2]);
    assert!(error.contains("is not a Wasm component\ncause: it is cut short or damaged"), "{error}");
    assert!(file_error("r.wasm", &whole[..6]).contains("is not a Wasm component"));
}

#[test]
fn damaged() {
    let whole = std::fs::read(root().join("recipes/lora_distributed.wasm")).unwrap();
    for index in (8..whole.len()).step_by(whole.len() / 40) {
        let mut damaged = whole.clone();
        damaged[index] ^= 0x55;
        // An error or a component; never a panic.
        let _ = file_error("r.wasm", &damaged);
    }
}

#[test]
fn too_large() {
    let error = file_error("r.rhai", " ".repeat(2 << 20).as_bytes());
    assert!(error.contains("it has 2097152 bytes, and a guest may have 1048576"), "{error}");
    insta::assert_snapshot!(file_error("r.wasm", &vec![0; (10 << 20) + 1]), @"
    error: cannot read the recipe `[DIR]/r.wasm`
    cause: it has 10485761 bytes, and a guest may have 10485760
    hint: `limits.guest_mb=11` in the config lets it in, `--guest-mb 11` at `host check`
    ");
}

#[test]
fn other_world() {
    insta::assert_snapshot!(load_error(&guest("target/guests/other_world.wasm")), @r#"
    error: the component `target/guests/other_world.wasm` is not a recipe of host:sdk
    cause: it exports `hello`, not `main`
    hint: a recipe in Rust ends with `host_sdk::recipe!(…)`
    "#);
}

#[test]
fn a_template_for_a_recipe() {
    insta::assert_snapshot!(load_error(&guest("templates/summarize.wasm")), @r#"
    error: `templates/summarize.wasm` is a template, not a recipe
    hint: a recipe in Rust ends with `host_sdk::recipe!(…)`
    "#);
}

#[test]
fn a_recipe_for_a_template() {
    for path in ["recipes/lora_distributed.wasm", "recipes/lora_distributed.rhai"] {
        let Err(error) = open_template(&guest(path), &GuestLimits::default()) else { panic!("{path} is no template") };
        assert!(error.message.contains("not a template"), "{error}");
    }
}

#[test]
fn other_sdk() {
    insta::assert_snapshot!(load_error(&guest("target/guests/other_sdk.wasm")), @r#"
    error: recipe wants host:sdk 0.0.1, this host offers 0.1.0
      --> target/guests/other_sdk.wasm
    hint: build the recipe with the `host-sdk` of this host, or take the host it was built for
    "#);
}

#[test]
fn wants_files() {
    insta::assert_snapshot!(load_error(&guest("target/guests/wants_files.wasm")), @r#"
    error: the recipe `target/guests/wants_files.wasm` wants `wasi:filesystem/types`, which guests do not get
    cause: it imports `wasi:filesystem/types`, `wasi:filesystem/preopens`, `wasi:clocks/wall-clock`
    hint: a guest has no files: remove what uses `std::fs`; data comes as rows, settings from the config
    "#);
}

#[test]
fn script_with_a_syntax_error() {
    insta::assert_snapshot!(file_error("r.rhai", b"let run = host::open();\nfor step in {\n"), @r#"
    error: cannot read the script `[DIR]/r.rhai`
      --> [DIR]/r.rhai:2:13
    cause: Expecting a boolean expression
    "#);
}

#[test]
fn script_that_wants_what_is_around_a_closure() {
    let script = b"fn configure(columns) { [\"messages\"] }\nfn render(row, settings) { row.messages.map(|m| m.wrap(settings.a, \"\")) }";
    insta::assert_snapshot!(file_error("t.rhai", script), @"
    error: cannot read the script `[DIR]/t.rhai`
      --> [DIR]/t.rhai:2:56
    cause: Undefined variable: settings
    hint: a function, `|x| …` too, sees its parameters alone; a `for` loop sees what is around it
    hint: `const` makes what `global::NAME` reads
    ");
}

#[test]
fn template_with_settings() {
    let guest = GuestRef { settings: json!({"language": "de"}), ..guest("templates/summarize.rhai") };
    let Err(error) = open_template(&guest, &GuestLimits::default()) else { panic!("settings are refused") };
    insta::assert_snapshot!(error, @"
    error: the template `templates/summarize.rhai` takes no settings, and was given `language`
    hint: define `fn render(row, settings)` to take them, or remove the keys
    ");
}
