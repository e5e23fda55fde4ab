//! A recipe that opens a file.

fn main() -> host_sdk::Result<()> {
    let text = std::fs::read_to_string("/etc/passwd").map_err(|error| error.to_string())?;
    host_sdk::log(&text);
    Ok(())
}

host_sdk::recipe!(main);
