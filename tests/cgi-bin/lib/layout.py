def page(title): print(f"<title>{title}</title>\n<h1>{title}</h1>")
