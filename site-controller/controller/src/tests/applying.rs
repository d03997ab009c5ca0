//! Desired state that is applied.

use std::fs;

use skein_api::{ProxySpec, SiteSpec};

use super::*;

#[test]
fn apply_is_all_or_nothing() {
    let (_dir, paths) = listening();
    let controller = silent(&paths, None);
    let mut request = connector("good");
    request.resources.push(rpc::Resource {
        kind: "Connector".into(),
        name: "bad".into(),
        json: connector("bad").resources[0].json.replace("5432", "70000"),
        ..Default::default()
    });
    let error = controller.apply(request).unwrap_err();
    assert!(error.message().contains("bad") && error.message().contains("port"), "{error}");
    assert!(controller.state().resources.connectors.is_empty());

    let full = silent(&paths, Some(FullAfter(AtomicUsize::new(0))));
    let error = full.apply(connector("db")).unwrap_err();
    assert!(error.message().contains("disk is full"), "{error}");
    assert!(full.state().resources.connectors.is_empty());

    let actions = |reply: rpc::ApplyReply| reply.changes[0].action.clone();
    assert_eq!(actions(controller.apply(connector("db")).unwrap()), "created");
    assert_eq!(actions(controller.apply(connector("db")).unwrap()), "unchanged");
    assert_eq!(controller.get_resources("connectors", "db").unwrap().len(), 1);
    assert!(controller.get_resources("connector", "other").is_err());
}

/// The site with a proxy, or none, and what the environment has for one.
fn proxied(
    controller: &Controller,
    proxy: Option<&ProxySpec>,
    given: Option<(&str, &str)>,
) -> rpc::ApplyRequest {
    let site = controller.state().resources.site.clone().unwrap();
    let spec = SiteSpec { proxy: proxy.cloned(), ..site.spec };
    let site = Resource::Site(Manifest { spec, ..site });
    let resource = rpc::Resource { json: site.to_json(), ..Default::default() };
    let proxy_credentials = given.map(|(url, credentials)| rpc::ProxyCredentials {
        url: url.into(),
        credentials: credentials.into(),
    });
    rpc::ApplyRequest { resources: vec![resource], proxy_credentials, ..Default::default() }
}

#[test]
fn credentials_of_a_proxy_come_and_go_with_it() {
    let (_dir, paths) = listening();
    let controller = silent(&paths, None);
    let file = paths.state().join("proxy-credentials");
    let kept = || fs::read_to_string(&file).ok();
    let credentials_file = file.to_str().map(str::to_owned);
    let url = "http://a:1";
    let proxy = ProxySpec { url: url.into(), credentials_file, ..ProxySpec::default() };
    let with = |proxy: Option<&ProxySpec>, given| proxied(&controller, proxy, given);
    let action =
        |request: rpc::ApplyRequest| controller.apply(request).unwrap().changes[0].action.clone();

    // What is refused, or only tried, leaves nothing.
    let mut refused = with(Some(&proxy), Some((url, "me:mine")));
    refused.resources.extend(connector("DB").resources);
    controller.apply(refused).unwrap_err();
    let tried = with(Some(&proxy), Some((url, "me:mine")));
    controller.apply(rpc::ApplyRequest { dry_run: true, ..tried }).unwrap();
    let full = silent(&paths, Some(FullAfter(AtomicUsize::new(0))));
    full.apply(with(Some(&proxy), Some((url, "me:mine")))).unwrap_err();
    assert_eq!(kept(), None);
    assert_eq!(action(with(Some(&proxy), Some((url, "me:mine")))), "changed");
    assert_eq!(kept().unwrap(), "me:mine\n");

    // Others than those of the site's own proxy are not for it.
    assert_eq!(action(with(Some(&proxy), Some(("http://b:1", "you:yours")))), "unchanged");
    assert_eq!(action(with(Some(&proxy), None)), "unchanged");
    assert_eq!(kept().unwrap(), "me:mine\n");
    assert_eq!(action(with(Some(&proxy), Some((url, "me:new")))), "changed");
    assert_eq!(kept().unwrap(), "me:new\n");
    assert_eq!(action(with(Some(&proxy), Some((url, "me:new")))), "unchanged");

    // However the proxy is taken out.
    controller.apply(connector("db")).unwrap();
    assert_eq!(kept().unwrap(), "me:new\n");
    assert_eq!(action(with(None, None)), "changed");
    assert_eq!(kept(), None);
}
