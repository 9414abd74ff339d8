use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A root of its own with both blocks on it.
struct Disk {
    root: TempDir,
    fs: Fs,
}

impl Disk {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let fs = Fs::new(TenantDirs::new(vec![root.path().to_owned()]));
        Self { root, fs }
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.root.path().display())
    }

    /// Where `name` of the tenant really is.
    fn real(&self, tenant: &str, name: &str) -> PathBuf {
        self.root.path().join(tenant).join(name)
    }

    async fn put(&self, tenant: &str, name: &str, content: &str) -> Result<Value, Fault> {
        self.put_job(json!({"path": self.path(name), "content": content}), &Scope::of(tenant)).await
    }

    async fn put_job(&self, job: Value, scope: &Scope) -> Result<Value, Fault> {
        let put = Put::parse(&raw(&job)).expect("the parameters are valid");
        self.fs.put(&put, scope).await.map(|output| value(&output))
    }

    async fn get(&self, tenant: &str, name: &str) -> Result<Value, Fault> {
        self.get_in(name, &Scope::of(tenant)).await
    }

    async fn get_in(&self, name: &str, scope: &Scope) -> Result<Value, Fault> {
        let get = Get::parse(&raw(&json!({"path": self.path(name)}))).expect("the parameters are valid");
        self.fs.get(&get, scope).await.map(|output| value(&output))
    }

    /// The names in a tenant's directory.
    fn names(&self, tenant: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.path().join(tenant)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn raw(job: &Value) -> Box<RawValue> {
    RawValue::from_string(job.to_string()).unwrap()
}

fn value(output: &Output) -> Value {
    serde_json::from_str(output.0.get()).unwrap()
}

#[track_caller]
fn invalid(job: Value, code: u16, pointer: &str) {
    let invalid = Put::parse(&raw(&job)).expect_err("the parameters were accepted");
    assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (code, pointer), "{job}");
}

#[test]
fn parameters_are_checked_at_the_door() {
    invalid(json!({"content": ""}), 1002, "/job/path");
    invalid(json!({"path": "", "content": ""}), 1002, "/job/path");
    invalid(json!({"path": 5, "content": ""}), 1003, "/job/path");
    invalid(json!({"path": "/data/../x", "content": ""}), 2003, "/job/path");
    invalid(json!({"path": "x", "content": ""}), 2003, "/job/path");
    invalid(json!({"path": "/x"}), 1002, "/job/content");
    invalid(json!({"path": "/x", "content": null}), 1002, "/job/content");
    invalid(json!({"path": "/x", "content": 5}), 1003, "/job/content");
    invalid(json!({"path": "/x", "content": "", "content_base64": ""}), 1003, "/job/content_base64");
    invalid(json!({"path": "/x", "content_base64": "?"}), 1003, "/job/content_base64");
    invalid(json!({"path": "/x", "content": "", "content_type": "a\r\nb"}), 1003, "/job/content_type");
    invalid(json!({"path": "/x", "content": "", "content_type": "x".repeat(256)}), 1003, "/job/content_type");
    assert_eq!(Get::parse(&raw(&json!({}))).unwrap_err().cause.code(), 1002);
    assert_eq!(Get::parse(&raw(&json!({"path": "/x/"}))).unwrap_err().cause.code(), 2003);
}

#[tokio::test]
async fn a_file_comes_back_as_it_was_written() {
    let disk = Disk::new();
    let put = disk.put("acme", "a/b/out.json", "{\"é\":\"\\u0000\"}\n").await.unwrap();
    let path = disk.path("a/b/out.json");
    assert_eq!(put, json!({"path": path, "size_bytes": 16, "content_type": "application/json"}));
    let got = disk.get("acme", "a/b/out.json").await.unwrap();
    let expected = json!({
        "path": path, "size_bytes": 16, "content_type": "application/json", "content": "{\"é\":\"\\u0000\"}\n",
    });
    assert_eq!(got, expected);
    disk.put("acme", "empty", "").await.unwrap();
    assert_eq!(disk.get("acme", "empty").await.unwrap()["content"], "");
}

#[tokio::test]
async fn bytes_that_are_not_utf_8_travel_as_base64() {
    let disk = Disk::new();
    let job = json!({"path": disk.path("x.bin"), "content_base64": "//4A"});
    assert_eq!(disk.put_job(job, &Scope::of("acme")).await.unwrap()["size_bytes"], 3);
    let got = disk.get("acme", "x.bin").await.unwrap();
    assert_eq!((&got["content_base64"], &got["content"]), (&json!("//4A"), &Value::Null));
    assert_eq!(std::fs::read(disk.real("acme", "x.bin")).unwrap(), [0xff, 0xfe, 0]);
}

#[tokio::test]
async fn a_content_type_is_kept_with_the_file_or_guessed_from_its_name() {
    let disk = Disk::new();
    let job = json!({"path": disk.path("x.txt"), "content": "", "content_type": "text/markdown; charset=utf-8"});
    assert_eq!(disk.put_job(job, &Scope::of("acme")).await.unwrap()["content_type"], "text/markdown; charset=utf-8");
    let file = File::open(disk.real("acme", "x.txt")).unwrap();
    let has_attributes = rustix::fs::fgetxattr(&file, TYPE_ATTRIBUTE, &mut [0_u8; 255][..]).is_ok();
    let expected = if has_attributes { "text/markdown; charset=utf-8" } else { "text/plain" };
    assert_eq!(disk.get("acme", "x.txt").await.unwrap()["content_type"], expected);
    for (name, content_type) in [("x.txt", "text/plain"), ("x.png", "image/png"), ("x", DEFAULT_TYPE)] {
        disk.put("acme", name, "").await.unwrap();
        assert_eq!(disk.get("acme", name).await.unwrap()["content_type"], content_type, "{name}");
    }
}

#[tokio::test]
async fn tenants_do_not_see_each_other() {
    let disk = Disk::new();
    disk.put("acme", "x", "acme's").await.unwrap();
    assert_eq!(disk.get("bolt", "x").await.unwrap_err().cause, Cause::ExecutionFailed);
    disk.put("bolt", "x", "bolt's").await.unwrap();
    assert_eq!(disk.get("acme", "x").await.unwrap()["content"], "acme's");
    assert_eq!(disk.get("bolt", "x").await.unwrap()["content"], "bolt's");
    for (tenant, path) in [("bolt", "acme/x"), ("acme", "bolt/x")] {
        assert_eq!(disk.get(tenant, path).await.unwrap_err().cause, Cause::ExecutionFailed);
        disk.put(tenant, path, "inside").await.unwrap();
    }
    assert_eq!(disk.get("acme", "x").await.unwrap()["content"], "acme's");
    assert_eq!(disk.get("bolt", "x").await.unwrap()["content"], "bolt's");
}

#[tokio::test]
async fn a_reader_keeps_the_old_file_and_a_new_one_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let disk = Disk::new();
    disk.put("acme", "x", "old").await.unwrap();
    let reader = File::open(disk.real("acme", "x")).unwrap();
    disk.put("acme", "x", "new and longer").await.unwrap();
    assert_eq!(std::io::read_to_string(reader).unwrap(), "old");
    assert_eq!(disk.get("acme", "x").await.unwrap()["content"], "new and longer");
    assert_eq!(disk.names("acme"), ["x"]);
    assert_eq!(disk.real("acme", "x").metadata().unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn links_and_what_is_no_file_are_left_alone() {
    let disk = Disk::new();
    disk.put("acme", "dir/x", "mine").await.unwrap();
    let outside = disk.root.path().join("outside");
    std::fs::write(&outside, "theirs").unwrap();
    std::os::unix::fs::symlink(&outside, disk.real("acme", "link")).unwrap();
    std::os::unix::fs::symlink(disk.root.path(), disk.real("acme", "up")).unwrap();
    for name in ["link", "up/outside", "up/new", "dir"] {
        let fault = disk.put("acme", name, "overwritten").await.unwrap_err();
        assert_eq!((fault.cause, fault.details.path), (Cause::NotAllowed, Some(disk.path(name))), "{name}");
        assert_eq!(disk.get("acme", name).await.unwrap_err().cause, Cause::NotAllowed, "{name}");
    }
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "theirs");
    assert!(!disk.root.path().join("new").exists());
}

#[tokio::test]
async fn a_failed_write_leaves_the_old_file_and_no_other() {
    let disk = Disk::new();
    disk.put("acme", "x", "old").await.unwrap();
    let late = Scope { deadline: Instant::now(), ..Scope::of("acme") };
    let job = json!({"path": disk.path("x"), "content": "new"});
    assert_eq!(disk.put_job(job, &late).await.unwrap_err().cause, Cause::DeadlinePassed);
    assert_eq!(disk.names("acme"), ["x"]);
    assert_eq!(disk.get("acme", "x").await.unwrap()["content"], "old");
}

#[tokio::test]
async fn a_file_that_no_result_can_hold_is_refused_by_its_size() {
    let disk = Disk::new();
    let narrow = Scope { max_output_bytes: 300, ..Scope::of("acme") };
    disk.put("acme", "small", "text").await.unwrap();
    assert!(disk.get_in("small", &narrow).await.is_ok());
    disk.put("acme", "quotes", &"\"".repeat(160)).await.unwrap();
    disk.put("acme", "controls", &"\u{1}".repeat(60)).await.unwrap();
    for name in ["quotes", "controls"] {
        assert_eq!(disk.get_in(name, &narrow).await.unwrap_err().cause, Cause::OverCap, "{name}");
        assert!(disk.get("acme", name).await.is_ok(), "{name}");
    }
    // Sparse: reading it would take the memory of the machine.
    let huge = File::create(disk.real("acme", "huge")).unwrap();
    huge.set_len(1 << 40).unwrap();
    let fault = disk.get("acme", "huge").await.unwrap_err();
    assert_eq!((fault.cause, fault.cause.is_dead_letter()), (Cause::OverCap, true));
}

#[test]
fn the_length_of_a_json_string_is_known_beforehand() {
    let texts = ["", "plain", "\"\\/\n\r\t\u{8}\u{c}\u{b}\u{0}\u{1f}\u{7f}", "é€😀\u{2028}"];
    for text in texts {
        let json = serde_json::to_string(text).unwrap();
        assert_eq!(encoded_len(text.as_bytes(), Some(text)), json.len(), "{json}");
    }
    for bytes in [&b""[..], b"\xff", b"\xff\xff", b"\xff\xff\xff", b"\xff\xff\xff\xff"] {
        assert_eq!(encoded_len(bytes, None), STANDARD.encode(bytes).len() + 2);
    }
}

#[tokio::test]
async fn a_missing_root_is_a_missing_file() {
    let fs = Fs::new(TenantDirs::new(vec!["/nowhere/at/all".into()]));
    let put = Put::parse(&raw(&json!({"path": "/nowhere/at/all/x", "content": ""}))).unwrap();
    assert_eq!(fs.put(&put, &Scope::of("acme")).await.unwrap_err().cause, Cause::ExecutionFailed);
    let put = Put::parse(&raw(&json!({"path": "/elsewhere/x", "content": ""}))).unwrap();
    assert_eq!(fs.put(&put, &Scope::of("acme")).await.unwrap_err().cause, Cause::NotAllowed);
}
