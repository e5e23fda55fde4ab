//! Lists the files that `host new` lays beside a new guest, so that the program holds them as they are in the repository.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sdk");
    let mut files = vec![];
    list(&sdk, &mut files);
    files.sort();
    let mut text = String::from("&[\n");
    for path in files {
        let name = path.strip_prefix(&sdk).unwrap();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "    ({:?}, include_bytes!({:?})),", name, path);
    }
    text.push(']');
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap()).join("sdk_files.rs");
    std::fs::write(out, text).unwrap();
    println!("cargo:rerun-if-changed={}", sdk.display());
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            list(&path, files);
        } else {
            files.push(path);
        }
    }
}
