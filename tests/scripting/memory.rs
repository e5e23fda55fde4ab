//! What a script can make its process take: less than `limits.memory_mb`, whatever it tries, and its thread's stack.
//!
//! Each script runs in a process of its own, this test binary, which measures itself.

use std::process::Command;

use host::config::plan::GuestLimits;
use host::data::template::{Cell, Row};
use host::worker::StopFlag;
use host_rank::script::{on_big_stack, open_template};
use serde_json::json;

use crate::support::{Linear, guest, run_with};

const SCRIPT: &str = "HOST_TEST_SCRIPT";
const BUDGET_MB: usize = 64;
const TENSORS_MB: usize = 300;

/// Memory ends these, not time.
fn limits() -> GuestLimits {
    GuestLimits { memory_mb: BUDGET_MB, tensors_mb: TENSORS_MB, seconds: 600.0, ..GuestLimits::default() }
}

fn status(key: &str) -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

#[test]
#[ignore = "the process that the tests below start"]
fn in_a_process_of_its_own() {
    let Some(path) = std::env::var_os(SCRIPT) else { return };
    let path = path.to_str().unwrap();
    // What the engine and torch need once is not the script's.
    let _ = run_with("recipes/lora_distributed.rhai", &limits(), Linear::new(json!({})), StopFlag::default());
    let before = status("VmRSS");
    let report = match std::fs::read_to_string(path).unwrap().contains("fn render") {
        true => on_big_stack(|| {
            let mut template = open_template(&guest(path), &limits())?.open()?;
            template.configure(&["text".into()])?;
            template.render(vec![Row { id: 0, cells: vec![Cell::Text("x".repeat(1000))] }])
        })
        .unwrap()
        .map(|_| ()),
        false => run_with(path, &limits(), Linear::new(json!({})), StopFlag::default()).map(|_| ()),
    };
    let grown = status("VmHWM").saturating_sub(before);
    println!("\ngrown {grown}\n{}", report.err().map_or("no error".to_owned(), |error| error.to_string()));
}

/// What came of a script, after its process took less than `most` MiB for it.
fn within(most: usize, text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.rhai");
    std::fs::write(&path, text).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory::in_a_process_of_its_own", "--ignored", "--nocapture"])
        .env(SCRIPT, &path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let (_, rest) = said.split_once("\ngrown ").unwrap();
    let (grown, rest) = rest.split_once('\n').unwrap();
    let grown = grown.parse::<usize>().unwrap() >> 20;
    println!("{grown} MiB: {text}");
    assert!(grown <= most, "{grown} MiB of {most}: {text}");
    let report = rest.split("\ntest ").next().unwrap().trim();
    report.lines().find_map(|line| line.strip_prefix("cause: ")).unwrap_or(report).to_owned()
}

/// A text half as long as one may be.
const LONG: &str = "let s = \"x\"; while s.len() < 131072 { s += s; } let i = 0;";

#[test]
fn no_script_holds_more_than_its_budget() {
    let too_much = "the script holds 32 MiB, and may hold 32 MiB, half of its memory of 64 MiB";
    let cases = [
        ("texts in a map, set by index", "let m = #{}; loop { m[`k${i}`] = s + i; i += 1; }", too_much),
        ("maps in maps", "let m = #{}; loop { m[`k${i}`] = #{}; m[`k${i}`].a = s + i; i += 1; }", too_much),
        ("texts in an array, set by index", "let a = []; a.pad(60000, 0); loop { a[i] = s + i; i += 1; }", too_much),
        (
            "arrays that are full",
            "let a = []; a.pad(200, 0); loop { let b = []; b.pad(60000, i); a[i] = b; i += 1; }",
            too_much,
        ),
        (
            "many variables",
            "fn f(n) { let a = [n]; a.pad(60000, n); let b = a; b[0] = 1; let c = b; c[0] = 2; if n > 0 { f(n - 1); } a.len() } f(30);",
            too_much,
        ),
        ("letters of a text", "loop { let a = s.split(\"\"); }", "Size of array/BLOB too large"),
        ("a text in place of each letter", "s.replace(\"x\", s);", "Length of string too large"),
        ("a text in place of each letter, by its letter", "s.replace('x', s);", "Length of string too large"),
        ("texts in texts", "let t = s + s; loop { t += s; }", "Length of string too large"),
        ("texts written into each other", "let t = `${s}${s}${s}`;", "Length of string too large"),
        ("padding", "s.pad(1000000000000, \"yz\");", "Length of string too large"),
        ("an array padded", "let a = []; a.pad(1000000000000, 0);", "Size of array/BLOB too large"),
        (
            "a range as an array",
            "let a = []; for n in 0..9223372036854775807 { a.push(n); }",
            "Size of array/BLOB too large",
        ),
        ("maps that hold themselves", "let m = #{a: s}; loop { m = #{a: m, b: m}; }", "Length of string too large"),
        ("arrays that hold themselves", "let a = [0]; loop { a.push(a); }", "Size of array/BLOB too large"),
        (
            "what `to_debug` makes of it",
            "let t = \"\\u0000\"; while t.len() < 100000 { t += t; } let d = t.to_debug();",
            "Length of string too large",
        ),
        (
            "errors that are caught",
            "let a = [0]; while i < 50000 { try { throw s + i; } catch (e) { a[0] = e; } i += 1; }",
            "it returned without taking a step, so nothing is trained",
        ),
    ];
    let mut wrong = vec![];
    for (what, text, cause) in cases {
        wrong.extend(
            Some(within(BUDGET_MB, &format!("{LONG}\n{text}"))).filter(|found| found != cause).map(|f| (what, f)),
        );
    }
    assert_eq!(wrong, []);
}

/// What a template hands over is copied, whereas its messages share texts.
#[test]
fn no_template_hands_over_more_than_it_may() {
    let render = |body: &str| format!("fn render(row) {{ {LONG} {body} }}");
    let outer = BUDGET_MB + limits().hostcall_mb;
    assert_eq!(within(outer, &render("let m = user(s); loop { m = m.wrap(s, s); }")), "Text of a message too large");
    assert_eq!(
        within(outer, &render("let a = []; a.pad(60000, user(s)); a")),
        "`render` gave back more than 33554432 bytes"
    );
    let parts = render("let p = []; p.pad(60000, \"\"); let a = []; a.pad(60000, user(p)); a");
    assert_eq!(within(outer, &parts), "`render` gave back more than 33554432 bytes");
}

/// A nested value is copied, compared, shown and dropped by as many calls as it is deep.
#[test]
fn depth_of_values_fits_the_stack() {
    // As deep as the time allows: each level is paid for by looking at all those below it.
    let build = "fn g(x) { [[[[[[[[x]]]]]]]] } let a = []; for i in 0..500 { a = g(a); } let b = a;";
    let stack = host::config::limits::SCRIPT_STACK >> 20;
    for end in ["`${a}`;", "a == b;", "debug(a);", "a.index_of(b);", "b.push(1);", "a in b;"] {
        let report = within(BUDGET_MB + stack, &format!("{build} {end}"));
        assert_eq!(report, "it returned without taking a step, so nothing is trained", "{end}");
    }
    // 2 KiB are enough for a level: see the constant.
    let levels = host::config::limits::SCRIPT_ARRAY + host::config::limits::SCRIPT_MAP;
    assert!(levels << 11 <= host::config::limits::SCRIPT_STACK);
}

/// Torch is not let write what exceeds `limits.tensors_mb`: the script holds 191 MiB, to which each of these would add 114 or
/// more.
#[test]
fn no_tensor_is_made_that_exceeds_the_limit() {
    for operation in ["exp()", "add_scalar(1)", "softmax(0)", "clamp(0, 1)", "cumsum(0)", "to_int()"] {
        let text = format!(
            "let run = host::open(); let step = run.next_step(); let batch = step.next_batch();
             let t = host::full([30000000], 1); let held = host::full([20000000], 1); let u = t.{operation};"
        );
        let said = within(250, &text);
        assert!(said.contains("a tensor of shape [30000000] brings the guest's to"), "{operation}: {said}");
    }
}
